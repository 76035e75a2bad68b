"""Training on real Ray Train workers: it learns, it is the same for any number of workers, and it goes on after the worst."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import S3Store
from loop_for_tests import run
from shards_for_tests import digits_job, log_names, write_digit_shards

from eagleray import api, storage
from eagleray.artifacts.package import load_card, load_examples, load_weights, save_package
from eagleray.artifacts.signing import make_key_pair
from eagleray.cluster.connect import Connection
from eagleray.data.shards import load_manifest
from eagleray.errors import ConfigError, DataError, TrainingError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digit_shards(tmp_path_factory.mktemp("digits"))


def test_two_workers_learn_and_the_best_epoch_is_registered(
    ray_cluster: Connection, s3_store: S3Store, shards: Path, tmp_path: Path
) -> None:
    """Shards and runs on S3, registry on SQLite."""
    data = storage.join(s3_store.bucket_uri, "data")
    storage.copy_tree(str(shards), data)
    job = digits_job(shards, tmp_path, "train.ema_decay=0.8", "train.epochs=6").model_copy(
        update={
            "workspace": digits_job(
                shards, tmp_path, f"workspace.root={s3_store.bucket_uri}/work", f"workspace.tracking_uri=sqlite:///{tmp_path}/mlflow.db"
            ).workspace
        }
    )
    job = job.model_copy(update={"data": job.data.model_copy(update={split: f"{data}/{split}" for split in ("train", "val", "test")})})
    seen: list[dict[str, float]] = []
    trained = api.train(job, name="first", on_epoch=seen.append)
    assert [metrics["epoch"] for metrics in seen] == [0, 1, 2, 3, 4, 5]
    assert all(metrics["train_samples"] == 480 and metrics["val_samples"] == 120 for metrics in seen)
    assert trained.metrics["val_top1"] == max(metrics["val_top1"] for metrics in seen) > 0.85
    assert trained.metrics["test_top1"] > 0.8 and trained.metrics["test_samples"] == 120
    assert storage.exists(f"{s3_store.bucket_uri}/work/runs/first/learning_curve.png")
    card = load_card(trained.version.package_uri)
    assert card.classes == [str(label) for label in range(10)]
    assert card.job == job.model_dump(mode="json")
    examples = load_examples(trained.version.package_uri, card)
    assert examples is not None and examples.shape == (120, 8, 8, 3)  # all that the validation split has
    assert card.run_name == "first" and len(card.data_digest) == 64 and card.code_version.startswith("0.")
    assert api.list_models(job.workspace)[0].version == trained.version.version == 1
    assert log_names() >= {"run first, worker 0", "run first, worker 1"}

    with pytest.raises(TrainingError, match="already holds a run; resume it with --resume first"):
        api.train(job, name="first")


def test_each_link_from_a_version_to_its_data_is_checked(ray_cluster: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public, other = (make_key_pair(tmp_path / name) for name in ("mine.pem", "other.pem"))
    monkeypatch.setenv("EAGLERAY_SIGNING_KEY", str(tmp_path / "mine.pem"))
    shards = write_digit_shards(tmp_path / "data")
    job = digits_job(shards, tmp_path, "train.epochs=1", "train.num_workers=1")
    trained = api.train(job, name="linked")

    def links(**options: Any) -> dict[str, tuple[str, str]]:
        found = api.verify_model(job.workspace, "digits:1", **options)[1]
        return {link.name: (link.status, link.detail) for link in found}

    whole = links(trusted_keys=[public], with_shards=True)
    assert list(whole) == ["signature", "weights", "examples", "run", "job file", "code", "data", "quarantine", "shards"]
    assert {name for name, (status, _) in whole.items() if status != "holds"} <= {"code"}, whole  # unknown in a checkout with changes

    assert links(trusted_keys=[other])["signature"][0] == "broken"
    package, run = Path(trained.version.package_uri), Path(trained.training.run_uri)
    changes: dict[str, tuple[Path, Callable[[bytes], bytes]]] = {
        "signature": (package / "card.json", lambda data: data.replace(b'"classes"', b' "classes"')),
        "weights": (package / "weights.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        "examples": (package / "examples.parquet", lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:]),
        "job file": (run / "job.yaml", lambda data: data.replace(b"lr: 0.005", b"lr: 0.006")),
        "data": (shards / "train" / "manifest.json", lambda data: data.replace(b'"num_refused":0', b'"num_refused":1')),
        "quarantine": (run / "quarantine.json", lambda data: b'[{"key": "1.png", "shard": "s", "reason": "r"}]'),
        "shards": (shards / "train" / "shard-00000.parquet", lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:]),
    }
    for name, (path, change) in changes.items():
        before = path.read_bytes() if path.exists() else None
        changed = change(before or b"")
        assert changed != before
        path.write_bytes(changed)
        broken = {link for link, (status, _) in links(trusted_keys=[public], with_shards=True).items() if status == "broken"}
        assert broken == {name} | ({"run"} if name == "weights" else set()), name
        path.unlink() if before is None else path.write_bytes(before)
    save_package(
        str(package),
        {key: tensor + 1 for key, tensor in load_weights(str(package), load_card(str(package))).items()},
        load_card(str(package)),
    )
    replaced = links(trusted_keys=[public])
    assert replaced["signature"][0] == "holds" and replaced["weights"][0] == replaced["run"][0] == "broken"


def test_two_workers_learn_from_mixed_data_sets_with_all_augmentation_on(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    mixture = [{"uri": str(shards / "train"), "weight": 0.75}, {"uri": str(shards / "test"), "weight": 1}]
    job = digits_job(
        shards,
        tmp_path,
        f"data.train={json.dumps(mixture)}",
        "data.augment.policy={name: randaugment, num_ops: 1, magnitude: 5}",
        "data.augment.color_jitter={brightness: 0.2, contrast: 0.2}",
        "data.augment.erase=0.2",
        "train.mixup_alpha=0.2",
        "train.cutmix_alpha=1.0",
        "train.epochs=6",
        "data.test=null",
    )
    seen: list[dict[str, float]] = []
    trained = api.train(job, name="augmented", on_epoch=seen.append)
    assert trained.metrics["val_top1"] > 0.75
    assert all(metrics["train_samples"] == 0.75 * 480 + 120 for metrics in seen)
    assert load_card(trained.version.package_uri).data_digest not in (load_manifest(str(shards / s)).digest for s in ("train", "test"))
    # Mixed pictures are harder than those of the validation split.
    assert seen[-1]["train_loss"] > seen[-1]["val_loss"]


def test_a_worker_killed_within_an_epoch_goes_on_at_that_batch(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    """kill -9 of one of two workers: every epoch has the same batches, in the same order, as undisturbed on one worker."""
    job = digits_job(shards, tmp_path, "train.checkpoint_every_steps=2", "data.test=null")
    undisturbed = [pause.metrics["order_digest"] for pause in run(job) if pause.is_epoch_end]
    crashing = digits_job(
        shards,
        tmp_path,
        f"model={{name: 'models_for_tests:crash_in_third_epoch', params: {{marker: '{tmp_path / 'crashed'}'}}}}",
        "train.checkpoint_every_steps=2",
        "data.test=null",
    )
    seen: dict[float, dict[str, float]] = {}
    api.train(crashing, name="killed", on_epoch=lambda metrics: seen.update({metrics["epoch"]: metrics}))
    assert (tmp_path / "crashed").exists()
    assert [seen[epoch]["order_digest"] for epoch in range(4)] == undisturbed
    assert len(set(undisturbed)) == 4
    assert all(metrics["train_samples"] == 480 for metrics in seen.values())


def test_a_run_resumed_within_an_epoch_ends_like_an_undisturbed_one(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    """Bit for bit: the weights, and what is said of the whole epoch, though it was seen in two parts; with dropout."""
    job = digits_job(
        shards, tmp_path, "train.num_workers=1", "train.deterministic=true", "train.checkpoint_every_steps=7", "train.epochs=2"
    )
    job = job.model_copy(update={"model": job.model.model_copy(update={"params": {"dropout": 0.3}})})
    whole = run(job)
    assert [pause.is_epoch_end for pause in whole] == [False, False, True, False, False, True]
    resumed = run(job, resume=whole[1].state())
    assert [pause.epoch for pause in resumed] == [0, 1, 1, 1]
    for name in ("train_loss", "train_top1", "train_samples", "order_digest", "val_top1"):
        assert resumed[0].metrics[name] == whole[2].metrics[name], name
    first, second = whole[-1].state()["weights"], resumed[-1].state()["weights"]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_damaged_picture_is_named_in_the_run_and_the_model_and_too_many_stop_it(
    ray_cluster: Connection, shards: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    write_digit_shards(damaged, damaged=7)
    trained = api.train(digits_job(damaged, tmp_path, "data.max_bad_fraction=0.01", "train.epochs=1", "data.test=null"), name="run")
    named = load_card(trained.version.package_uri).quarantined
    assert len(named) == 1 and named[0]["shard"].endswith("train/shard-00000.parquet") and "picture" in named[0]["reason"]
    assert named == json.loads((tmp_path / "runs" / "run" / "quarantine.json").read_text())
    with pytest.raises(DataError, match=rf"1 of 480 pictures could not be decoded in epoch 1.*the first: {named[0]['key']} in"):
        run(digits_job(damaged, tmp_path, "train.num_workers=1"))


def test_an_error_that_would_only_come_again_ends_the_run_at_once(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    job = digits_job(
        shards,
        tmp_path,
        "train.optimizer={name: sgd, lr: 1000000.0}",
        "train.schedule.warmup_epochs=0",
        "train.num_workers=1",
        "data.test=null",
    )
    seen: list[dict[str, float]] = []
    with pytest.raises(
        TrainingError, match=r"gradients are not finite in epoch 1, step \d+ of 15, at learning rate 9\.\d+e\+05; lower train.optimizer.lr"
    ):
        api.train(job, name="diverging", on_epoch=seen.append)
    assert seen == []


def test_a_resumed_run_ends_like_an_undisturbed_one(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    """Bit for bit, with deterministic kernels: same weights, same losses."""
    job = digits_job(
        shards,
        tmp_path,
        "train.num_workers=1",
        "train.deterministic=true",
        "train.ema_decay=0.9",
        "train.mixup_alpha=0.2",
        "train.cutmix_alpha=1.0",
        "data.augment.policy=trivialaugment",
    )
    whole = run(job)
    resumed = run(job, resume=whole[1].state())
    assert [end.epoch for end in resumed] == [2, 3]
    assert [end.metrics["train_loss"] for end in resumed] == [end.metrics["train_loss"] for end in whole[2:]]
    first, second = whole[-1].state()["weights"], resumed[-1].state()["weights"]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("data.val=/nowhere", DataError, "no data set there .*make one with `eagleray ingest"),
        ("train.use_gpu=true", TrainingError, "needs 2 GPUs, the cluster has at most 0"),
        ("model.name=inception_v3", ConfigError, "cannot take pictures of data.image_size 8 px"),
        ("model.name=resnet19", ConfigError, "did you mean 'resnet1"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_starts(
    override: str, error: type[Exception], message: str, ray_cluster: Connection, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        api.train(digits_job(shards, tmp_path, override), name="refused")
    assert not (tmp_path / "runs" / "refused").exists()


def test_a_class_without_pictures_and_splits_of_other_classes_are_named(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    def parity(digit: int) -> str:
        return "odd" if digit % 2 else "even"

    few = write_digit_shards(tmp_path / "few", num_train=3)
    with pytest.raises(DataError, match=r"data.train .*few/train.*: no picture of class '\d' \(\d empty classes\); add some or remove"):
        api.train(digits_job(few, tmp_path), name="refused")
    other = write_digit_shards(tmp_path / "other", class_of=parity)
    with pytest.raises(DataError, match=r"data.val '.*other/val' has 2 classes, data.train .* has 10, or in another order; ingest both"):
        api.train(digits_job(shards, tmp_path, f"data.val={other / 'val'}"), name="refused")
    assert not (tmp_path / "runs" / "refused").exists()
