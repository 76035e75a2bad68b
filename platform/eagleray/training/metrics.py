"""Exact metrics over all ranks: sums, not means of means."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from eagleray.data.stream import Batch


@dataclass(frozen=True)
class BatchOutput:
    """Of one rank's batch: losses float [B], logits float [B, C], targets int64 [B], is_valid bool [B]."""

    losses: torch.Tensor
    logits: torch.Tensor
    targets: torch.Tensor
    is_valid: torch.Tensor


class Totals:
    """Sums of loss, top-1 and top-5 over the valid samples of a pass, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, output: BatchOutput) -> None:
        logits, targets = output.logits.detach(), output.targets
        is_hit = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        weight = output.is_valid.double()
        values = (output.losses.detach().double(), is_hit[:, 0].double(), is_hit.any(dim=1).double(), torch.ones_like(weight))
        self._sums += torch.stack([(value * weight).sum() for value in values])

    def reduce(self, prefix: str) -> dict[str, float]:
        """Return `{prefix}_loss`, `_top1`, `_top5` (fractions) and `_samples` over all ranks."""
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        loss, top1, top5, count = self._sums.tolist()
        samples = max(count, 1.0)
        return {
            f"{prefix}_loss": loss / samples,
            f"{prefix}_top1": top1 / samples,
            f"{prefix}_top5": top5 / samples,
            f"{prefix}_samples": count,
        }


class TimedBatches:
    """Passes batches on and keeps the time spent waiting for them, in seconds."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.wait_s = 0.0
        self.first_batch_s = 0.0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(self._batches, None)
            waited = time.perf_counter() - start
            if batch is None:
                return
            self.first_batch_s = self.first_batch_s or waited
            self.wait_s += waited
            yield batch
