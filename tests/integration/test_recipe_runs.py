"""Options of the recipe in real runs: they change what they say they change, and nothing of it is lost in a resume."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.data
import torch
from loop_for_tests import worker_of
from shards_for_tests import digits_job, write_digit_shards

from eagleray import api
from eagleray.cluster.connect import Connection
from eagleray.config.schema import AugmentConfig, JobConfig, TrainSize
from eagleray.data.plan import EpochPlan
from eagleray.data.shards import load_manifest
from eagleray.data.stream import BatchStream, DecodeResources
from eagleray.data.transforms import Preprocessing
from eagleray.data.window import WindowDecoder
from eagleray.errors import ConfigError, TrainingError
from eagleray.training import loop
from eagleray.training.loop import train
from eagleray.training.mixing import Inputs
from eagleray.training.parallel import gradient_sync

pytestmark = pytest.mark.slow

DECODE = DecodeResources(tasks=1, cpus=0.2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digit_shards(tmp_path_factory.mktemp("digits"))


def states(job: JobConfig, tmp_path: Path, resume: dict[str, Any] | None = None) -> Iterator[tuple[dict[str, float], dict[str, Any]]]:
    """Run the loop in this process; yield the metrics and the state of each pause, gone through a file."""
    for pause in train(job, worker_of(), resume):
        torch.save(pause.state(), tmp_path / "state.pt")
        yield pause.metrics, torch.load(tmp_path / "state.pt", weights_only=True)


@pytest.mark.parametrize(
    ("settings", "limit", "by_tasks"),
    [
        ((), 4096, False),
        ((), 10, True),
        (("data.decode=cluster",), 4096, True),
        (("data.image_size=96",), 4096, True),
        (("data.image_size=96", "data.decode=worker"), 4096, False),
    ],
)
def test_small_pictures_are_decoded_by_the_worker(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], limit: int, by_tasks: bool
) -> None:
    """Those that have more than `limit` bytes on average are not small."""

    class HandedOverError(Exception):
        pass

    def hand_over(*arguments: Any) -> None:
        raise HandedOverError

    monkeypatch.setattr(ray.data, "from_blocks", hand_over)
    monkeypatch.setattr(loop, "SMALL_BYTES", limit)
    job = digits_job(shards, tmp_path, "train.num_workers=1", "train.epochs=1", *settings)
    with pytest.raises(HandedOverError) if by_tasks else nullcontext():
        list(train(job, worker_of()))


def test_parts_of_a_batch_give_the_step_of_the_whole(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    """With mixing over the whole batch, clipping and a last batch that is filled up, in a network without batch norm."""
    options = ["train.num_workers=1", "train.epochs=1", "train.mixup_alpha=0.2", "train.cutmix_alpha=1.0", "train.grad_clip_norm=0.5"]
    options += ["train.global_batch_size=64", "train.optimizer={name: sgd, lr: 0.05}"]
    ends = [list(states(digits_job(shards, tmp_path, *options, f"train.accumulate={parts}"), tmp_path))[-1] for parts in (1, 4)]
    (whole, first), (parts, second) = ends
    assert whole["order_digest"] == parts["order_digest"]
    assert whole["train_samples"] == parts["train_samples"] == 480
    assert whole["train_loss"] == pytest.approx(parts["train_loss"], rel=1e-4)
    for name, weights in first["weights"].items():
        torch.testing.assert_close(weights, second["weights"][name], rtol=1e-3, atol=1e-5)


INPUTS = Inputs(
    images=torch.arange(16 * 12, dtype=torch.uint8).reshape(16, 2, 2, 3),
    targets=torch.arange(16) % 3,
    partners=None,
    weight=1.0,
    is_valid=torch.ones(16, dtype=torch.bool),
)


def _gradients(network: torch.nn.Module, inputs: Inputs, num_parts: int, world_size: int) -> list[torch.Tensor]:
    """Return the gradient of the mean loss over all of `INPUTS` after each part."""
    after = []
    for number, part in enumerate(inputs.split(num_parts), start=1):
        with gradient_sync(network, is_last=number == num_parts):
            losses = torch.nn.functional.cross_entropy(network(part.images.flatten(1) / 255), part.targets, reduction="sum")
            (losses * world_size / 16).backward()
        after.append(next(network.parameters()).grad.clone())  # type: ignore[union-attr]
    return after


def _gradients_of_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    replica = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(12, 3))
    torch.save(_gradients(replica, INPUTS.split(2)[rank], 4, world_size=2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_workers_average_their_gradients_once_for_all_parts(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_gradients_of_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert [torch.equal(*pair) for pair in zip(first, second, strict=True)] == [False, False, False, True]
    torch.manual_seed(0)
    torch.testing.assert_close(first[-1], _gradients(torch.nn.Linear(12, 3), INPUTS, 1, world_size=1)[0])


def test_nothing_of_a_recipe_is_lost_in_a_resume(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    """Bit for bit, from within the second epoch: loss scale, averages, accumulation, the optimizer's state, the size of pictures."""
    job = digits_job(
        shards,
        tmp_path,
        "train={epochs: 2, global_batch_size: 32, num_workers: 1, deterministic: true, checkpoint_every_steps: 10}",
        "train.optimizer={name: lamb, lr: 0.02}",
        "train.schedule={name: one_cycle}",
        "train.precision=fp16",
        "train.accumulate=2",
        "train.ema_decay=0.8",
        "train.grad_clip_norm=1.0",
        "data.train_size={start: 8, end: 12, ramp_epochs: [0, 1], multiple: 4}",
    )
    whole = list(states(job, tmp_path))
    assert [state["steps_done"] for _, state in whole] == [10, 15, 20, 30]
    assert whole[2][1]["scaler"]["_growth_tracker"] > 0
    resumed = list(states(job, tmp_path, resume=whole[2][1]))
    assert [state["steps_done"] for _, state in resumed] == [30]
    (metrics, end), (metrics_again, end_again) = whole[-1], resumed[-1]
    assert end["scaler"] == end_again["scaler"]
    for name in ("train_loss", "train_samples", "order_digest", "val_loss", "val_top1", "learning_rate"):
        assert metrics[name] == metrics_again[name], name
    for part in ("model", "weights"):
        assert all(torch.equal(tensor, end_again[part][name]) for name, tensor in end[part].items())


def test_a_bad_number_on_one_of_two_workers_costs_one_step_on_both(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    """And the best epoch's confusions are kept beside the run, exact over both workers."""
    job = digits_job(
        shards,
        tmp_path,
        "model.name=models_for_tests:break_in_fifth_pass",
        "train.on_nonfinite=skip",
        "train.accumulate=2",
        "train.epochs=2",
        "train.eval_flip=true",
        "data.test=null",
    )
    seen: list[dict[str, float]] = []
    trained = api.train(job, name="run", on_epoch=seen.append)
    assert [metrics["train_skipped_steps"] for metrics in seen] == [1, 0]
    assert [metrics["train_samples"] for metrics in seen] == [480 - 32, 480]
    assert all(np.isfinite(metrics["train_loss"]) and "val_top1_flip" in metrics for metrics in seen)

    kept = json.loads((tmp_path / "runs" / "run" / "confusion.json").read_text())
    matrix = np.array(kept["matrix"])
    assert kept["val_top1"] == trained.metrics["val_top1"] == max(metrics["val_top1"] for metrics in seen)
    assert matrix.sum() == 120 and np.trace(matrix) / 120 == pytest.approx(kept["val_top1"])
    assert min(kept["recall"]) == trained.metrics["val_worst_class_recall"]
    assert kept["classes"] == [str(label) for label in range(10)]
    assert (tmp_path / "runs" / "run" / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_grow_with_the_epochs_and_evaluation_does_not(ray_cluster: Connection, shards: Path) -> None:
    uri = str(shards / "train")
    plan = EpochPlan.of(load_manifest(uri), 32, 8, 64, seed=0)
    size = TrainSize(start=8, end=16, ramp_epochs=(0, 2), multiple=4)
    decoder = WindowDecoder((uri,), plan, Preprocessing(image_size=16, eval_resize=16), AugmentConfig(), train_size=size)
    ids = []
    for epoch, batches in enumerate(BatchStream(decoder, 0, 1, DECODE).epochs(0, 3)):
        for batch in batches:
            assert batch.images.shape == (32, 8 + 4 * epoch, 8 + 4 * epoch, 3)
            ids.append(batch.sample_ids[batch.is_valid.numpy()])
    assert (np.bincount(np.concatenate(ids)) == 3).all()


def test_a_compiled_network_learns_the_same(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    options = ["train.num_workers=1", "train.epochs=1", "data.test=null"]
    (plain, _), (compiled, state) = (
        next(states(digits_job(shards, tmp_path, *options, f"train.compile={on}"), tmp_path)) for on in ("false", "true")
    )
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-2)
    assert not any("_orig_mod" in name for name in state["weights"])


def test_what_a_device_cannot_do_is_said_with_the_cure(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    job = digits_job(shards, tmp_path, "model.name=models_for_tests:too_large", "train.num_workers=1")
    with pytest.raises(TrainingError, match=r"no memory left for 32 pictures of 8 px.*raise train.accumulate \(now 1\)"):
        next(train(job, worker_of()))
    with pytest.raises(ConfigError, match="sync_batch_norm: true works on GPUs only"):
        next(train(digits_job(shards, tmp_path, "train.sync_batch_norm=true"), worker_of(world_size=2)))
