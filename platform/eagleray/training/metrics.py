"""Exact metrics over all ranks: sums, not means of means."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from eagleray.data.stream import Batch
from eagleray.data.window import WindowDecoder


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
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)

    def add(self, output: BatchOutput, num_bad: int) -> None:
        """Add a batch, of which `num_bad` pictures could not be decoded."""
        logits, targets = output.logits.detach(), output.targets
        is_hit = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        weight = output.is_valid.double()
        values = (output.losses.detach().double(), is_hit[:, 0].double(), is_hit.any(dim=1).double(), torch.ones_like(weight))
        self._sums[:4] += torch.stack([(value * weight).sum() for value in values])
        self._sums[4] += num_bad

    def restore(self, sums: list[float]) -> None:
        self._sums += torch.tensor(sums, dtype=torch.float64, device=self._sums.device)

    def reduce(self) -> list[float]:
        """Return the sums over all ranks; see `rates`."""
        sums = self._sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        return [float(value) for value in sums.tolist()]


def rates(sums: list[float], prefix: str) -> dict[str, float]:
    """Return `{prefix}_loss`, `_top1`, `_top5` (fractions), `_samples` and `_quarantined` of the sums of `Totals`."""
    loss, top1, top5, count, bad = sums
    samples = max(count, 1.0)
    return {
        f"{prefix}_loss": loss / samples,
        f"{prefix}_top1": top1 / samples,
        f"{prefix}_top5": top5 / samples,
        f"{prefix}_samples": count,
        f"{prefix}_quarantined": bad,
    }


AccountState = dict[str, Any]
"""Of all ranks: `sums` of `Totals`, `order` (see `order_digest`) and `quarantined` (key, shard and reason of each)."""


class EpochAccount:
    """What an epoch's training has seen; kept in checkpoints, so that it is whole after a resume on any number of workers."""

    MAX_NAMED = 1000
    """Quarantined pictures that a rank looks into; all are counted."""

    def __init__(self, decoder: WindowDecoder, rank: int, world_size: int, device: torch.device) -> None:
        self._decoder = decoder
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._totals = Totals(device)
        self._order = 0
        self._quarantined: list[dict[str, str]] = []

    def restore(self, state: AccountState) -> None:
        """Go on from what `reduce` returned; one rank takes it, since all are added up again."""
        if self._rank == 0:
            self._totals.restore(state["sums"])
            self._order = state["order"]
            self._quarantined = list(state["quarantined"])

    def add(self, step: int, batch: Batch, output: BatchOutput) -> None:
        """Add this rank's part of the epoch's global batch number `step`."""
        self._totals.add(output, int(batch.is_bad.sum()))
        first = (step * self._world_size + self._rank) * len(batch.sample_ids)
        self._order = (self._order + order_digest(batch.sample_ids, first)) % 2**52
        for sample_id in batch.sample_ids[batch.is_bad].tolist():
            if len(self._quarantined) < self.MAX_NAMED:
                self._quarantined.append(self._decoder.explain(sample_id))

    def reduce(self) -> AccountState:
        """Add up all ranks; to be called by all of them."""
        order, quarantined = self._order, [self._quarantined]
        if dist.is_initialized():
            parts: list[Any] = [None] * self._world_size
            dist.all_gather_object(parts, (self._order, self._quarantined))
            order, quarantined = sum(part[0] for part in parts) % 2**52, [part[1] for part in parts]
        named = sorted((picture for part in quarantined for picture in part), key=lambda picture: (picture["shard"], picture["key"]))
        return {"sums": self._totals.reduce(), "order": order, "quarantined": named}


def epoch_metrics(account: AccountState) -> dict[str, float]:
    """Return the training metrics of a whole epoch, the digest of its order among them."""
    return {**rates(account["sums"], "train"), "order_digest": float(account["order"])}


def order_digest(sample_ids: NDArray[np.int64], first_place: int) -> int:
    """Return a sum, modulo 2**52, of a hash of each (place in the epoch's global batches, sample id).

    Equal sums mean the same samples in the same order. Being a sum, it is the same however the places are
    shared out among ranks, and fits a metric (a float) exactly.

    Args:
        sample_ids: int64 [B], at places `first_place`, `first_place` + 1, …
    """
    places = np.arange(first_place, first_place + len(sample_ids), dtype=np.uint64)
    hashes = _splitmix64(_splitmix64(places) ^ sample_ids.astype(np.uint64))
    return int(hashes.sum(dtype=np.uint64)) % 2**52


def _splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of uint64 values (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators")."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class TimedBatches:
    """Passes batches on, counts them, and keeps the time spent waiting for them, in seconds."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.count = 0
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
            self.count += 1
            yield batch
