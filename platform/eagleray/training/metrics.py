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

    @classmethod
    def join(cls, parts: list[BatchOutput]) -> BatchOutput:
        """Put the parts of a batch together again, without their graph."""
        columns = zip(*((part.losses.detach(), part.logits.detach(), part.targets, part.is_valid) for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))


LOSS_UNIT = 2.0**-24
"""Losses are summed in whole numbers of this, so that sums up to 2**29 are exact, in whatever order and on however many ranks."""


class Totals:
    """Sums of loss, top-1 and top-5 over the valid samples of a pass, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)

    def add(self, output: BatchOutput | None, num_bad: int) -> None:
        """Add a batch, of which `num_bad` pictures could not be decoded; None: a batch of which nothing else counts."""
        if num_bad:
            self._sums[4] += num_bad
        if output is None:
            return
        logits, targets = output.logits.detach(), output.targets
        is_hit = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        losses = (output.losses.detach().double() / LOSS_UNIT).round() * LOSS_UNIT
        values = torch.stack([losses, is_hit[:, 0].double(), is_hit.any(dim=1).double(), torch.ones_like(losses)])
        self._sums[:4] += (values * output.is_valid).sum(dim=1)

    def restore(self, sums: list[float]) -> None:
        self._sums += torch.tensor(sums, dtype=torch.float64, device=self._sums.device)

    def of_this_rank(self) -> list[float]:
        return [float(value) for value in self._sums.tolist()]

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


class Confusion:
    """How often each class was taken for each other one among the valid samples of a pass, counted on the device."""

    MAX_CLASSES = 4096
    """Above, the matrix would be too large (128 MB on the device), and nothing is counted."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._num_classes = num_classes
        size = num_classes if num_classes <= self.MAX_CLASSES else 0
        self._counts = torch.zeros(size * size, dtype=torch.int64, device=device)

    def add(self, output: BatchOutput) -> None:
        if len(self._counts):
            places = output.targets * self._num_classes + output.logits.argmax(dim=1)
            self._counts.index_add_(0, places, output.is_valid.long())

    def reduce(self) -> NDArray[np.int64] | None:
        """Return int64 [C, C] over all ranks, true classes down and predicted ones across; to be called by all of them."""
        if not len(self._counts):
            return None
        counts = self._counts.clone()
        if dist.is_initialized():
            dist.all_reduce(counts)
        return counts.reshape(self._num_classes, self._num_classes).cpu().numpy()


def class_rates(confusion: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (recall, precision) of each class, float64 [C]; nan for a class without samples, or never predicted."""
    with np.errstate(invalid="ignore"):
        right = np.diag(confusion)
        return right / confusion.sum(axis=1), right / confusion.sum(axis=0)


def class_metrics(confusion: NDArray[np.int64], prefix: str) -> dict[str, float]:
    """Return the mean and the worst recall over the classes that have samples."""
    recall = class_rates(confusion)[0]
    recall = recall[~np.isnan(recall)]
    return {f"{prefix}_mean_class_recall": float(recall.mean()), f"{prefix}_worst_class_recall": float(recall.min())}


AccountState = dict[str, Any]
"""Of all ranks: `sums` of `Totals`, `order` (see `order_digest`), `quarantined` (key, shard and reason of each), `skipped` steps
and their `skipped_samples`."""


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
        self._skipped = 0
        self._skipped_samples = 0

    def restore(self, state: AccountState) -> None:
        """Go on from what `reduce` returned; one rank takes it, since all are added up again."""
        self._skipped = state["skipped"]
        if self._rank == 0:
            self._totals.restore(state["sums"])
            self._order = state["order"]
            self._quarantined = list(state["quarantined"])
            self._skipped_samples = state["skipped_samples"]

    def add(self, step: int, batch: Batch, output: BatchOutput | None) -> None:
        """Add this rank's part of the epoch's global batch number `step`; None: the step was left out, by all ranks."""
        if output is None:
            self._skipped += 1
            self._skipped_samples += int(batch.is_valid.sum())
        self._totals.add(output, int(batch.is_bad.sum()))
        first = (step * self._world_size + self._rank) * len(batch.sample_ids)
        self._order = (self._order + order_digest(batch.sample_ids, first)) % 2**52
        for sample_id in batch.sample_ids[batch.is_bad].tolist():
            if len(self._quarantined) < self.MAX_NAMED:
                self._quarantined.append(self._decoder.explain(sample_id))

    def so_far(self) -> tuple[float, float]:
        """Return loss and top-1 of this rank's share of the epoch up to here; waits for the device."""
        sums = rates(self._totals.of_this_rank(), "train")
        return sums["train_loss"], sums["train_top1"]

    def reduce(self) -> AccountState:
        """Add up all ranks; to be called by all of them."""
        parts: list[Any] = [(self._order, self._quarantined, self._skipped_samples)]
        if dist.is_initialized():
            own, parts = parts[0], [None] * self._world_size
            dist.all_gather_object(parts, own)
        orders, quarantined, skipped_samples = zip(*parts, strict=True)
        named = sorted((picture for part in quarantined for picture in part), key=lambda picture: (picture["shard"], picture["key"]))
        return {
            "sums": self._totals.reduce(),
            "order": sum(orders) % 2**52,
            "quarantined": named,
            "skipped": self._skipped,
            "skipped_samples": sum(skipped_samples),
        }


def epoch_metrics(account: AccountState) -> dict[str, float]:
    """Return the training metrics of a whole epoch, the digest of its order among them."""
    return {
        **rates(account["sums"], "train"),
        "train_skipped_steps": float(account["skipped"]),
        "train_skipped_samples": float(account["skipped_samples"]),
        "order_digest": float(account["order"]),
    }


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
        self.start = time.perf_counter()
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
