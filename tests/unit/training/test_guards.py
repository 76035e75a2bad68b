"""Broken gradients never reach the weights, and what is said of them helps."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eagleray.config.load import build_job
from eagleray.config.schema import JobConfig
from eagleray.errors import TrainingError
from eagleray.training.guards import MAX_SKIPPED_IN_A_ROW, NORM_WARMUP, Diverged, GradientGuard, explains_out_of_memory

STEPS = 7


def job_of(*overrides: str) -> JobConfig:
    return build_job({"name": "test", "data": {"train": "a", "val": "b"}}, list(overrides))


def guard_of(model: nn.Module, *overrides: str) -> GradientGuard:
    return GradientGuard(model, job_of(*overrides), steps_per_epoch=STEPS, learning_rate=lambda step: 0.1 * step)


FINE, BROKEN = torch.tensor(1.0), torch.tensor(float("nan"))


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_run_stops_at_gradients_that_are_not_finite(norm: float) -> None:
    guard = guard_of(nn.Linear(2, 2))
    assert guard.accepts(8, FINE)
    with pytest.raises(
        TrainingError, match=r"in epoch 2, step 3 of 7, at learning rate 0.9; lower train.optimizer.lr .*on_nonfinite: skip"
    ):
        guard.accepts(9, torch.tensor(norm))


def test_what_is_read_late_still_names_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = guard_of(nn.Linear(2, 2))
    monkeypatch.setattr(guard, "_check_every", 50)
    for step in (1, 2, 3):
        guard.accepts(step, FINE if step == 1 else BROKEN)
    with pytest.raises(TrainingError, match="epoch 1, step 3 of 7"):
        guard.check()


def test_steps_are_left_out_with_what_batch_norm_took_from_them_but_not_for_ever() -> None:
    model = nn.BatchNorm1d(2)
    guard = guard_of(model, "train.on_nonfinite=skip")
    model(torch.randn(8, 2))
    assert guard.accepts(0, FINE)
    average = model.running_mean.clone()
    model(torch.full((8, 2), torch.nan))
    assert model.running_mean.isnan().all()
    assert not guard.accepts(1, BROKEN)
    assert model.running_mean.equal(average)
    assert guard.accepts(2, FINE)
    with pytest.raises(TrainingError, match="epoch 1, step 4 of 7 and the 9 after it"):
        for step in range(3, 4 + MAX_SKIPPED_IN_A_ROW):
            assert not guard.accepts(step, BROKEN)
    assert step == 2 + MAX_SKIPPED_IN_A_ROW


def norm_of(value: float) -> torch.Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize(("broken", "left_out"), [(9, range(7, 10)), (13, range(7, 14)), (3, range(4))])
def test_a_rollback_leaves_out_what_led_there_but_nothing_of_the_epoch_before(broken: int, left_out: range) -> None:
    guard = guard_of(nn.Linear(2, 2), "train.on_nonfinite=rollback")
    with pytest.raises(Diverged, match=r"not finite in epoch .* set train.grad_clip_norm$") as raised:
        guard.accepts(broken, BROKEN)
    assert raised.value.steps == left_out
    assert pickle.loads(pickle.dumps(raised.value)).steps == left_out  # it may have to leave a worker's process


def test_a_rollback_leaves_out_ten_steps_of_a_long_epoch() -> None:
    guard = GradientGuard(nn.Linear(2, 2), job_of("train.on_nonfinite=rollback"), 1000, lambda step: 0.1)
    with pytest.raises(Diverged) as raised:
        guard.accepts(2500, BROKEN)
    assert raised.value.steps == range(2490, 2501)


def test_a_rollback_with_a_scaled_loss_waits_until_no_scale_helps() -> None:
    guard = guard_of(nn.Linear(2, 2), "train.on_nonfinite=rollback", "train.precision=fp16")
    with pytest.raises(Diverged) as raised:
        for step in range(1, 20):
            assert guard.accepts(step, FINE if step < 3 else BROKEN) == (step < 3)
    assert raised.value.steps == range(3 + MAX_SKIPPED_IN_A_ROW)


def feed(guard: GradientGuard, *norms: float, start: int = 0) -> int:
    """Return how many of the norms are accepted before one is broken."""
    for number, norm in enumerate(norms):
        try:
            guard.accepts(start + number, norm_of(norm))
        except TrainingError:
            return number
    return len(norms)


def test_an_explosion_is_told_from_what_is_usual() -> None:
    usual = [0.5, 2.0] * NORM_WARMUP
    assert feed(guard_of(nn.Linear(2, 2)), *usual, 1e9) == len(usual) + 1  # nothing was asked for
    for factor, norm, is_fine in ((10, 9.0, True), (10, 12.0, False), (100, 90.0, True), (100, 120.0, False)):
        guard = guard_of(nn.Linear(2, 2), f"train.explosion_factor={factor}")
        assert feed(guard, *usual, norm) == len(usual) + is_fine
    slow = [1.05**step for step in range(200)]
    assert feed(guard_of(nn.Linear(2, 2), "train.explosion_factor=100"), *slow) == len(slow)
    assert feed(guard_of(nn.Linear(2, 2), "train.explosion_factor=10"), *[1.0] * (NORM_WARMUP - 1), 1e9) == NORM_WARMUP
    with pytest.raises(TrainingError, match="50 times as large as usual in epoch 7, step 1 of 7"):
        guard = guard_of(nn.Linear(2, 2), "train.explosion_factor=10")
        feed(guard, *[2.0] * 42)
        guard.accepts(42, norm_of(100.0))


def test_an_explosion_that_is_left_out_does_not_become_usual() -> None:
    guard = guard_of(nn.Linear(2, 2), "train.explosion_factor=10", "train.on_nonfinite=skip")
    feed(guard, *[1.0] * NORM_WARMUP)
    for step in range(100, 400, 4):
        assert not guard.accepts(step, norm_of(1000.0))
        assert guard.accepts(step + 1, norm_of(1.0))


def test_what_is_usual_outlives_a_resume() -> None:
    before = guard_of(nn.Linear(2, 2), "train.explosion_factor=10")
    feed(before, *[0.9, 1.1] * NORM_WARMUP)
    after = guard_of(nn.Linear(2, 2), "train.explosion_factor=10")
    after.restore(before.state())
    assert after.state() == before.state()
    assert feed(after, 12.0, start=40) == 0


@pytest.mark.parametrize("is_resumed", [False, True])
def test_gradients_of_more_parameters_are_no_explosion(is_resumed: bool) -> None:
    """The whole network is trained after two epochs of its head alone."""
    settings = ("train.explosion_factor=10", "train.finetune.freeze_epochs=4")
    guard = guard_of(nn.Linear(2, 2), *settings)
    feed(guard, *[1.0] * (4 * STEPS))
    if is_resumed:
        state = guard.state()
        guard = guard_of(nn.Linear(2, 2), *settings)
        guard.restore(state)
    assert feed(guard, *[50.0] * 30, 5000.0, start=4 * STEPS) == 30


def _broken_step_of_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    guard = guard_of(nn.Linear(2, 2), "train.explosion_factor=10", "train.on_nonfinite=rollback")
    # On rank 1 alone, the second to last norm is a rounding error above the limit.
    norms = [1.0] * NORM_WARMUP + [9.999999 if rank == 0 else 10.00001, 1000.0]
    Path(folder, f"{rank}.txt").write_text(str(feed(guard, *norms)))
    torch.distributed.destroy_process_group()


def test_all_workers_go_by_the_norm_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_broken_step_of_rank, (str(tmp_path),), nprocs=2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [str(NORM_WARMUP + 1)] * 2


def test_a_device_without_memory_is_explained() -> None:
    @explains_out_of_memory
    def loop(job: JobConfig) -> Any:
        yield 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    job = job_of("train.global_batch_size=256", "train.num_workers=2", "train.accumulate=4")
    with pytest.raises(
        TrainingError, match=r"no memory left for 32 pictures of 224 px.*Tried to allocate.*train.accumulate \(now 4\)"
    ) as raised:
        list(loop(job))
    assert "\n" not in str(raised.value)
