"""What keeps a run from going on with broken weights, or from ending in a message that helps nobody."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from eagleray.config.schema import JobConfig
from eagleray.errors import TrainingError

CHECK_EVERY = 50
"""Steps between two looks at the device for gradients that are broken; looking makes the CPU wait for the GPU."""

MAX_SKIPPED_IN_A_ROW = 10
"""Steps left out one after the other at which a run stops, or rolls back, all the same."""

ROLLBACK_MARGIN = 10
"""Steps before a broken one that are left out with it when a run rolls back: another way up to that place is taken."""

NORM_MEMORY = 100
"""Steps over which the usual norm is averaged."""

NORM_WARMUP = 20
"""Steps without which no norm is usual."""


class Diverged(TrainingError):
    """The weights are broken, and the job says `rollback`: go back to a state from before `steps`, and leave those out."""

    def __init__(self, message: str, what: str = "", steps: range = range(0)) -> None:
        super().__init__(message)
        self.what = what
        self.steps = steps


class GradientGuard:
    """Watches over the norm of the gradients, which the workers have averaged already: all of them see the same.

    A step is broken if its norm is infinite or no number, or, with `train.explosion_factor`, far above the usual one: the
    geometric mean of the good steps before it. With `stop` and `rollback`, what was found on the device is read every
    `CHECK_EVERY` steps and before each checkpoint. With `skip`, and with the scaled loss of fp16, whose scale is found by
    trying, it is read at every step.
    """

    def __init__(self, model: nn.Module, job: JobConfig, steps_per_epoch: int, learning_rate: Callable[[int], float]) -> None:
        """`learning_rate` gives it for a step of the run."""
        self._job = job
        self._steps_per_epoch = steps_per_epoch
        self._learning_rate = learning_rate
        self._is_skipping = job.train.on_nonfinite == "skip" or job.train.precision == "fp16"
        self._skipped_in_a_row = 0
        self._is_head_only = job.train.finetune.freeze_epochs > 0
        device = next(model.parameters()).device
        self._check_every = CHECK_EVERY if device.type == "cuda" else 1
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._first_ratio = torch.zeros((), dtype=torch.float64, device=device)
        self._num_good = torch.zeros((), dtype=torch.int64, device=device)
        self._log_mean = torch.zeros((), dtype=torch.float64, device=device)
        # Batch norm's averages take in a bad batch before anybody knows that it is one.
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()] if self._is_skipping else []
        self._saved = [buffer.clone() for buffer in self._buffers]

    def accepts(self, step: int, norm: torch.Tensor) -> bool:
        """Return whether the update of a step of the run may be made.

        Args:
            norm: of all gradients, a scalar on the device.

        Raises:
            Diverged: a step is broken and the job says `rollback`.
            TrainingError: a step is broken, and either the job says `stop` or too many were in a row.
        """
        is_bad, ratio = self._compare(step, norm)
        if not self._is_skipping:
            is_first = is_bad & (self._first_bad < 0)
            self._first_bad = torch.where(is_first, step, self._first_bad)
            self._first_ratio = torch.where(is_first, ratio, self._first_ratio)
            if step % self._check_every == 0:
                self.check()
            return True
        is_good = not is_bad
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            source, target = (buffer, saved) if is_good else (saved, buffer)
            target.copy_(source)
        self._skipped_in_a_row = 0 if is_good else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise self._error(range(step - self._skipped_in_a_row + 1, step + 1), float(ratio))
        return is_good

    def check(self) -> None:
        """Raise TrainingError if a step was broken since the last look, and the job does not say `skip`; see `accepts`."""
        first_bad = int(self._first_bad)
        if first_bad >= 0:
            raise self._error(range(first_bad, first_bad + 1), float(self._first_ratio))

    def state(self) -> dict[str, float]:
        """Return what is usual so far, to be kept in checkpoints."""
        return {"num_good": int(self._num_good), "log_mean": float(self._log_mean), "is_head_only": self._is_head_only}

    def restore(self, state: dict[str, float]) -> None:
        self._is_head_only = bool(state["is_head_only"])
        self._num_good.fill_(state["num_good"])
        self._log_mean.fill_(state["log_mean"])

    def _compare(self, step: int, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whether a step is broken and its norm relative to the usual one, scalars on the device."""
        train = self._job.train
        if train.explosion_factor is None:
            return ~norm.isfinite(), norm.double()
        if dist.is_initialized():  # devices of several kinds may differ in the last bit: all go by rank 0's
            dist.broadcast(norm, 0)
        is_head_only = step < train.finetune.freeze_epochs * self._steps_per_epoch
        if is_head_only != self._is_head_only:  # more parameters have gradients from here on
            self._is_head_only = is_head_only
            self._num_good.zero_()
        log_norm = norm.double().clamp_min(1e-30).log()
        log_ratio = log_norm - self._log_mean
        is_bad = ~norm.isfinite() | ((self._num_good >= NORM_WARMUP) & (log_ratio > math.log(train.explosion_factor)))
        weight = 1 / (self._num_good.clamp_max(NORM_MEMORY - 1) + 1)
        self._log_mean = torch.where(is_bad, self._log_mean, self._log_mean + log_ratio * weight)
        self._num_good += ~is_bad
        return is_bad, log_ratio.exp()

    def _error(self, broken: range, ratio: float) -> TrainingError:
        train = self._job.train
        epoch, step_of_epoch = divmod(broken[0], self._steps_per_epoch)
        seen = f"{ratio:,.0f} times as large as usual" if math.isfinite(ratio) else "not finite"
        what = (
            f"the gradients are {seen} in epoch {epoch + 1}, step {step_of_epoch + 1} of {self._steps_per_epoch}"
            f"{f' and the {len(broken) - 1} after it' if len(broken) > 1 else ''}, at learning rate {self._learning_rate(broken[0]):.3g}"
        )
        message = (
            f"{what}; lower train.optimizer.lr ({train.optimizer.lr}), lengthen train.schedule.warmup_epochs or set train.grad_clip_norm"
        )
        if train.on_nonfinite == "rollback":
            start = max(epoch * self._steps_per_epoch, broken[0] - ROLLBACK_MARGIN)
            return Diverged(message, what, range(start, broken[-1] + 1))
        remedy = "" if self._is_skipping else ", or go on without such steps: train.on_nonfinite: skip, or rollback"
        return TrainingError(message + remedy)


def explains_out_of_memory(loop: Callable[..., Generator[Any, None, None]]) -> Callable[..., Generator[Any, None, None]]:
    """Let a training loop, whose first argument is the job, say what helps where the device has no memory left."""

    @wraps(loop)
    def explaining(job: JobConfig, *arguments: Any, **options: Any) -> Generator[Any, None, None]:
        try:
            yield from loop(job, *arguments, **options)
        except torch.OutOfMemoryError as error:
            train = job.train
            raise TrainingError(
                f"the device has no memory left for {train.global_batch_size // train.max_workers // train.accumulate} pictures of "
                f"{job.data.image_size} px at a time ({str(error).splitlines()[0]}); raise train.accumulate (now {train.accumulate}), "
                "lower train.global_batch_size or data.image_size, or set train.precision: bf16"
            ) from error

    return explaining
