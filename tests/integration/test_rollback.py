"""A run whose weights break goes back to a checkpoint and takes another way; one bad picture breaks them in each epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loop_for_tests import worker_of
from shards_for_tests import digits_job, write_digit_shards
from typer.testing import CliRunner

from eagleray import api
from eagleray.artifacts.runs import Rollback, load_rollbacks, load_run
from eagleray.cli import app
from eagleray.cluster.connect import Connection
from eagleray.config.schema import JobConfig
from eagleray.data.mixture import load_training_set
from eagleray.errors import TrainingError
from eagleray.training.guards import Diverged
from eagleray.training.loop import train
from eagleray.training.metrics import order_digest

pytestmark = pytest.mark.slow

WHITE = 126
"""Comes in step 25 of the first epoch and in step 1 of the second one."""
STEPS = 30  # of an epoch
LEFT_OUT = [range(15, 26), range(30, 32)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digit_shards(tmp_path_factory.mktemp("digits"), white=WHITE)


def poisoned_job(shards: Path, root: Path, by: str, *overrides: str) -> JobConfig:
    return digits_job(
        shards,
        root,
        f"model={{name: 'models_for_tests:poisoned', params: {{by: '{by}', kill: '{root / 'kill'}'}}}}",
        "train.global_batch_size=16",
        "train.epochs=2",
        "train.ema_decay=0.9",
        "train.on_nonfinite=rollback",
        "train.checkpoint_every_steps=10",
        *overrides,
    )


@pytest.mark.parametrize(
    ("parallelism", "by", "explosion_factor", "seen"), [("ddp", "nan", "null", "not finite"), ("fsdp", "1e6", "50", "times")]
)
def test_two_workers_go_back_and_leave_out_what_broke_the_weights(
    ray_cluster: Connection, shards: Path, tmp_path: Path, parallelism: str, by: str, explosion_factor: str, seen: str
) -> None:
    """As often as the job allows; also after a resume, and when a worker dies on the way."""
    settings = (f"train.parallelism={parallelism}", f"train.explosion_factor={explosion_factor}", "train.max_rollbacks=1", "data.test=null")
    job = poisoned_job(shards, tmp_path, by, *settings)
    messages: list[str] = []
    with pytest.raises(TrainingError, match=r"in epoch 2, step 2 of 30.*gone back 1 time.* as often as train.max_rollbacks allows"):
        api.train(job, name="run", on_message=messages.append)
    run_uri = str(tmp_path / "runs" / "run")
    (first,) = load_rollbacks(run_uri)
    assert (first.back_to, first.steps) == (10, LEFT_OUT[0])
    assert seen in first.reason and "epoch 1, step 26 of 30" in first.reason
    assert [name.split("-")[1] for name in first.undone] == ["000000020"]
    assert any("going back to step 10 and leaving out the 11 step(s) of 16 pictures" in message for message in messages)

    stored = tmp_path / "runs" / "run" / "job.yaml"
    stored.write_text(stored.read_text().replace("max_rollbacks: 1", "max_rollbacks: 2"))
    (tmp_path / "kill").touch()
    trained = api.train(job, resume="run", on_message=messages.append)

    assert not (tmp_path / "kill").exists()
    assert any("failed" in message and "starting again from the newest checkpoint" in message for message in messages)
    rollbacks = load_rollbacks(run_uri)
    assert [rollback.steps for rollback in rollbacks] == LEFT_OUT
    assert [rollback.back_to for rollback in rollbacks] == [10, 30]
    check_account(job, trained.training.history)
    assert trained.metrics["val_top1"] > 0.5
    check_what_is_shown(tmp_path, rollbacks)


def check_account(job: JobConfig, history: list[dict[str, float]]) -> None:
    """The data come in the order of an undisturbed run, and each picture counts once: as trained on, or as left out."""
    plan = load_training_set(job.data).plan(job.train.global_batch_size, job.data.lanes, job.data.shuffle_window, job.seed)
    assert plan.num_windows == 1
    for epoch, metrics in enumerate(history):
        assert metrics["order_digest"] == order_digest(plan.window(epoch, 0).sample_ids.ravel(), 0)
        assert metrics["train_rollbacks"] == 1
        assert metrics["train_skipped_steps"] == len(LEFT_OUT[epoch])
        assert metrics["train_skipped_samples"] == 16 * len(LEFT_OUT[epoch])
        assert metrics["train_samples"] + metrics["train_skipped_samples"] == 480


def check_what_is_shown(root: Path, rollbacks: list[Rollback]) -> None:
    assert load_run(str(root / "runs"), "run").rollbacks == rollbacks
    shown = " ".join(CliRunner().invoke(app, ["runs", "show", "run", "--root", str(root)]).output.split())  # long lines are broken
    assert "to step 10, without 11 step(s)" in shown and "to step 30, without 2 step(s)" in shown
    assert "208 pictures" in shown


def test_what_is_taken_up_is_what_would_have_been_without_those_steps(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    """Bit for bit: weights, averages, the optimizer's state, what is usual for the gradients."""
    job = poisoned_job(
        shards, tmp_path, "1e6", "train.num_workers=1", "train.epochs=1", "train.deterministic=true", "train.explosion_factor=50"
    )
    saved: list[dict[str, Any]] = []
    with pytest.raises(Diverged) as raised:
        for pause in train(job, worker_of()):
            torch.save(pause.state(), tmp_path / "state.pt")
            saved.append(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [state["steps_done"] for state in saved] == [10, 20]
    assert raised.value.steps == LEFT_OUT[0]

    (gone_back,) = [pause for pause in train(job, worker_of(), saved[0], rolled_back=LEFT_OUT) if pause.is_epoch_end]
    (undisturbed,) = [pause for pause in train(job, worker_of(), rolled_back=LEFT_OUT) if pause.is_epoch_end]
    for name in ("train_loss", "train_samples", "order_digest", "val_loss", "learning_rate"):
        assert gone_back.metrics[name] == undisturbed.metrics[name], name
    one, other = gone_back.state(), undisturbed.state()
    assert one["guard"] == other["guard"]
    for part in ("model", "weights", "ema"):
        assert all(torch.equal(tensor, other[part][name]) for name, tensor in one[part].items())
    for parameter, values in one["optimizer"]["state"].items():
        assert all(torch.equal(value, other["optimizer"]["state"][parameter][name]) for name, value in values.items())
