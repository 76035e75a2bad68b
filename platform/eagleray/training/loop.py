"""One training run as one worker sees it. Read `train` top to bottom.

The loop knows nothing of who runs it: Ray Train gives it a place among the ranks of a run
(`trainer`), a search runs it as a trial (`tuning.trial`). It yields at the end of each epoch and, where the job
asks for checkpoints in between, there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from eagleray.config.schema import JobConfig
from eagleray.data.mixture import load_training_set
from eagleray.data.plan import EpochPlan
from eagleray.data.shards import ReadOptions, load_manifest
from eagleray.data.stream import Batch, BatchStream, DecodeResources
from eagleray.data.transforms import Preprocessing, normalize
from eagleray.data.window import WindowDecoder
from eagleray.errors import DataError, TrainingError
from eagleray.models.zoo import build_model
from eagleray.training.metrics import AccountState, BatchOutput, EpochAccount, TimedBatches, Totals, epoch_metrics, rates
from eagleray.training.mixing import Mix, draw_mix
from eagleray.training.recipe import build_ema, build_optimizer, build_schedule, sample_losses


@dataclass(frozen=True)
class Worker:
    """A place among the workers of a run, and what it may use."""

    rank: int
    world_size: int
    device: torch.device
    threads: int
    train_decode: DecodeResources
    eval_decode: DecodeResources


@dataclass(frozen=True)
class Pause:
    """What the loop yields: a place from which a run can go on.

    Attributes:
        epoch: the epoch that has ended, or is under way.
        metrics: of the epoch; empty within one.
        quarantined: the epoch's pictures so far, of all ranks, that could not be decoded.
        state: gives all that is needed to go on from here.
    """

    epoch: int
    metrics: dict[str, float]
    quarantined: list[dict[str, str]]
    state: Callable[[], dict[str, Any]]

    @property
    def is_epoch_end(self) -> bool:
        return bool(self.metrics)


def train(  # noqa: PLR0915 - to be read in one piece
    job: JobConfig, worker: Worker, resume: dict[str, Any] | None = None
) -> Generator[Pause, None, None]:
    """Train `job.model` on `job.data` up to the next pause with each step of the iterator.

    Args:
        resume: the state of an earlier `Pause`, to go on after it; on any number of workers.

    Raises:
        DataError: shards are missing or damaged, or too many pictures are.
        TrainingError: the loss is not finite any more.
    """
    set_up_process(job, worker)
    data = load_training_set(job.data)
    preprocessing = Preprocessing.of(job.data)

    model = build_model(job.model, len(data.classes), job.data.image_size)
    model.to(worker.device).to(memory_format=torch.channels_last)
    ema = build_ema(model, job.train)
    plan = data.plan(job.train.global_batch_size, job.data.lanes, job.data.shuffle_window, job.seed)
    optimizer = build_optimizer(model, job.train.optimizer)
    schedule = build_schedule(optimizer, job.train.schedule, job.train.epochs, plan.steps_per_epoch)

    steps_done = 0  # since the start of the run: the one number that says where it stands
    if resume is not None:
        steps_done = resume["steps_done"]
        for name, part in (("model", model), ("ema", ema), ("optimizer", optimizer), ("schedule", schedule)):
            if part is not None:
                part.load_state_dict(resume[name])
    first_epoch, first_step = divmod(steps_done, plan.steps_per_epoch)
    replica = _replicate(model, worker)
    forward = Forward(worker.device, preprocessing, job.train.precision)

    read_options = tuple(ReadOptions.of(manifest, job.data) for manifest in data.manifests)
    decoder = WindowDecoder(data.uris, plan, preprocessing, job.data.augment, read_options=read_options)
    train_stream = BatchStream(decoder, worker.rank, worker.world_size, worker.train_decode)
    train_epochs = train_stream.epochs(first_epoch, job.train.epochs, first_step)
    val_epochs = eval_stream(job, job.data.val, worker).epochs(first_epoch, job.train.epochs)

    def pause(epoch: int, metrics: dict[str, float], account: AccountState) -> Pause:
        def state() -> dict[str, Any]:
            return {
                "steps_done": steps_done,
                "account": None if metrics else account,
                "model": model.state_dict(),
                "ema": ema.state_dict() if ema is not None else None,
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "weights": _evaluated(model, ema).state_dict(),
            }

        return Pause(epoch, metrics, account["quarantined"], state)

    for epoch, train_batches, val_batches in zip(range(first_epoch, job.train.epochs), train_epochs, val_epochs, strict=True):
        start = time.perf_counter()
        batches = TimedBatches(train_batches)
        account = EpochAccount(decoder, worker.rank, worker.world_size, worker.device)
        if resume is not None and resume["account"] is not None and epoch == first_epoch:
            account.restore(resume["account"])
        replica.train()
        for batch in batches:
            step = steps_done % plan.steps_per_epoch
            _seed_step(job.seed, steps_done, worker.rank)
            mix = draw_mix(job.train, batch, [job.seed, epoch, step, worker.rank], worker.device)
            output = forward(replica, batch, job.train.label_smoothing, mix)
            account.add(step, batch, output)
            # DDP averages gradients over ranks; this makes that average the mean over all samples that count.
            loss = (output.losses * output.is_valid).sum() * worker.world_size / plan.num_valid(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if job.train.grad_clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), job.train.grad_clip_norm)
            optimizer.step()
            schedule.step()
            if ema is not None:
                ema.update_parameters(model)
            steps_done += 1
            if _is_pause_due(job, steps_done) and step + 1 < plan.steps_per_epoch:
                yield pause(epoch, {}, account.reduce())
        train_s = time.perf_counter() - start
        whole = account.reduce()
        metrics = epoch_metrics(whole)
        _check(metrics, whole, job, plan, epoch)

        metrics |= evaluate(_evaluated(model, ema), val_batches, forward, "val")
        metrics |= {
            "epoch": epoch,
            "images_per_s": batches.count * plan.global_batch_size / train_s,
            "data_wait_fraction": batches.wait_s / train_s,
            "first_batch_s": batches.first_batch_s,
            "epoch_s": time.perf_counter() - start,
            "learning_rate": float(schedule.get_last_lr()[0]),
        }
        yield pause(epoch, metrics, whole)


def set_up_process(job: JobConfig, worker: Worker) -> None:
    """Seed this process (all ranks alike, so that the replicas start equal) and set its threads."""
    torch.manual_seed(job.seed)
    torch.set_num_threads(worker.threads)
    torch.use_deterministic_algorithms(job.train.deterministic)
    torch.backends.cudnn.benchmark = not job.train.deterministic
    torch.set_float32_matmul_precision("high")


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Let dropout and the like draw from (seed, step, rank) alone, so that a resumed run draws as an undisturbed one."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint32)[0]))


def _is_pause_due(job: JobConfig, steps_done: int) -> bool:
    every = job.train.checkpoint_every_steps
    return every is not None and steps_done % every == 0


class Forward:
    """Brings a batch to the device and through a network, in the precision of the job."""

    def __init__(self, device: torch.device, preprocessing: Preprocessing, precision: str) -> None:
        self.device = device
        self._preprocessing = preprocessing
        bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
        self._autocast: AbstractContextManager[Any] = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    def __call__(self, network: nn.Module, batch: Batch, label_smoothing: float, mix: Mix | None = None) -> BatchOutput:
        images, targets, is_valid = (tensor.to(self.device, non_blocking=True) for tensor in (batch.images, batch.targets, batch.is_valid))
        if mix is not None:
            images = mix.images(images)
        with self._autocast:
            losses, logits = sample_losses(network(normalize(images, self._preprocessing)), targets, label_smoothing, mix)
        return BatchOutput(losses, logits, targets if mix is None else mix.dominant(targets), is_valid)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterator[Batch], forward: Forward, prefix: str) -> dict[str, float]:
    """Return `{prefix}_loss`, `_top1`, `_top5` (fractions), `_samples` and `_quarantined`, exact over all ranks."""
    model.eval()
    totals = Totals(forward.device)
    for batch in batches:
        totals.add(forward(model, batch, label_smoothing=0.0), int(batch.is_bad.sum()))
    return rates(totals.reduce(), prefix)


def eval_stream(job: JobConfig, uri: str, worker: Worker) -> BatchStream:
    """Return this rank's part of a split, unshuffled, for evaluation."""
    manifest = load_manifest(uri)
    plan = EpochPlan.of(manifest, job.train.global_batch_size, job.data.lanes, job.data.shuffle_window, seed=None)
    decoder = WindowDecoder((uri,), plan, Preprocessing.of(job.data), augment=None, read_options=(ReadOptions.of(manifest, job.data),))
    return BatchStream(decoder, worker.rank, worker.world_size, worker.eval_decode)


def _replicate(model: nn.Module, worker: Worker) -> nn.Module:
    if worker.world_size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[worker.device] if worker.device.type == "cuda" else None)


def _evaluated(model: nn.Module, ema: AveragedModel | None) -> nn.Module:
    return ema.module if ema is not None else model


def _check(metrics: dict[str, float], account: AccountState, job: JobConfig, plan: EpochPlan, epoch: int) -> None:
    if not math.isfinite(metrics["train_loss"]):
        raise TrainingError(
            f"the training loss is {metrics['train_loss']} after epoch {epoch + 1}; lower train.optimizer.lr "
            f"({job.train.optimizer.lr}), lengthen train.schedule.warmup_epochs or set train.grad_clip_norm"
        )
    num_bad = round(metrics["train_quarantined"])
    if num_bad > job.data.max_bad_fraction * plan.num_rows:
        named = "; ".join(f"{picture['key']} in {picture['shard']}: {picture['reason']}" for picture in account["quarantined"][:3])
        raise DataError(
            f"{num_bad} of {plan.num_rows} pictures could not be decoded in epoch {epoch + 1}, more than data.max_bad_fraction "
            f"({job.data.max_bad_fraction:.2%}) allows; check the shards with `eagleray data verify`; the first: {named}"
        )
