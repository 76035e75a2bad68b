"""One training run as one worker sees it. Read `train` top to bottom.

The loop knows nothing of who runs it: Ray Train gives it a place among the ranks of a run
(`trainer`), a search runs it as a trial (`tuning.trial`). It yields at the end of each epoch and, where the job
asks for checkpoints in between, there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim.swa_utils import AveragedModel

from eagleray.artifacts.pretrained import load_pretrained
from eagleray.config.schema import JobConfig
from eagleray.data.decode import SMALL_BYTES
from eagleray.data.mixture import load_training_set
from eagleray.data.plan import EpochPlan
from eagleray.data.shards import Manifest, ReadOptions, load_manifest
from eagleray.data.stream import Batch, BatchStream, DecodeResources
from eagleray.data.transforms import Preprocessing, normalize
from eagleray.data.window import WindowDecoder
from eagleray.errors import DataError, TrainingError
from eagleray.models.zoo import build_model
from eagleray.training.finetune import find_head, freeze_parts, set_train_mode, train_parts
from eagleray.training.guards import GradientGuard, explains_out_of_memory
from eagleray.training.metrics import (
    AccountState,
    BatchOutput,
    Confusion,
    EpochAccount,
    TimedBatches,
    Totals,
    class_metrics,
    epoch_metrics,
    rates,
)
from eagleray.training.mixing import Inputs, draw_mix
from eagleray.training.parallel import (
    clip_gradients,
    gradient_sync,
    model_state,
    place,
    replicate,
    restore_model,
    share_buffers,
    with_sync_batch_norm,
)
from eagleray.training.recipe import build_ema, build_optimizer, build_schedule, learning_rate, sample_losses

SMALL_PX = 64
"""Side up to which a worker on a CPU decodes small pictures by itself: handing them over would be most of the work."""


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
class StepEnd:
    """What whoever runs the loop is told after each step: where it is, and what the epoch has seen so far."""

    epoch: int
    step: int
    steps_per_epoch: int
    account: EpochAccount
    batches: TimedBatches


@dataclass(frozen=True)
class Pause:
    """What the loop yields: a place from which a run can go on.

    Attributes:
        epoch: the epoch that has ended, or is under way.
        metrics: of the epoch, without those of validation where others validate; empty within one.
        quarantined: the epoch's pictures so far, of all ranks, that could not be decoded.
        state: gives all that is needed to go on from here.
        classes: their names.
        confusion: of the epoch's validation, int64 [C, C], true classes down and predicted ones across.
    """

    epoch: int
    metrics: dict[str, float]
    quarantined: list[dict[str, str]]
    state: Callable[[], dict[str, Any]]
    classes: list[str] = field(default_factory=list)
    confusion: NDArray[np.int64] | None = None

    @property
    def is_epoch_end(self) -> bool:
        return bool(self.metrics)


@explains_out_of_memory
def train(  # noqa: PLR0912, PLR0915 - to be read in one piece
    job: JobConfig,
    worker: Worker,
    resume: dict[str, Any] | None = None,
    after_step: Callable[[StepEnd], bool] = lambda end: False,
    rolled_back: Sequence[range] = (),
    validates: bool = True,
) -> Generator[Pause, None, None]:
    """Train `job.model` on `job.data` up to the next pause with each step of the iterator.

    Args:
        resume: the state of an earlier `Pause`, to go on after it; on any number of workers.
        after_step: returns whether to pause after this step too, on all ranks alike.
        rolled_back: steps of the run to leave out, those of each time that it was rolled back.
        validates: False: metrics at the end of an epoch are without those of validation; somebody else sees to it.

    Raises:
        DataError: shards are missing or damaged, or too many pictures are.
        Diverged: the weights are broken, and the job says to roll back.
        TrainingError: gradients are not finite, or the device has no memory left.
    """
    set_up_process(job, worker)
    data = load_training_set(job.data)
    preprocessing = Preprocessing.of(job.data)

    model = build_model(job.model, len(data.classes), job.data.image_size)
    head = find_head(job, len(data.classes))
    if job.model.pretrained is not None and resume is None:
        load_pretrained(model, job.model, data.classes, job.data.image_size)
    freeze_parts(model, job.train.finetune.freeze)
    model = with_sync_batch_norm(model, job.train, worker.device)
    ema = build_ema(model, job.train)
    place(model, ema, job.train, worker.device)
    plan = data.plan(job.train.global_batch_size, job.data.lanes, job.data.shuffle_window, job.seed)
    optimizer = build_optimizer(model, job.train, head)
    schedule = build_schedule(optimizer, job.train.schedule, job.train.epochs, plan.steps_per_epoch)
    scaler = torch.amp.GradScaler(worker.device.type, enabled=job.train.precision == "fp16")

    steps_done = 0  # since the start of the run: the one number that says where it stands
    if resume is not None:
        steps_done = resume["steps_done"]
        restore_model(resume, model, ema, optimizer)
        schedule.load_state_dict(resume["schedule"])
        scaler.load_state_dict(resume["scaler"])
    first_epoch, first_step = divmod(steps_done, plan.steps_per_epoch)
    guard = GradientGuard(model, job, plan.steps_per_epoch, lambda step: learning_rate(schedule, step))
    if resume is not None:
        guard.restore(resume["guard"])
    forward = Forward(worker.device, preprocessing, job.train.precision)

    read_options = tuple(ReadOptions.of(manifest, job.data) for manifest in data.manifests)
    decoder = WindowDecoder(data.uris, plan, preprocessing, job.data.augment, read_options, job.data.train_size)
    train_stream = BatchStream(decoder, worker.rank, worker.world_size, _decoding(job, data.manifests, worker, worker.train_decode))
    train_epochs = train_stream.epochs(first_epoch, job.train.epochs, first_step)
    val_epochs = eval_stream(job, job.data.val, worker).epochs(first_epoch, job.train.epochs)

    def pause(epoch: int, metrics: dict[str, float], account: AccountState, confusion: NDArray[np.int64] | None = None) -> Pause:
        def state() -> dict[str, Any]:
            return {
                "steps_done": steps_done,
                "account": None if metrics else account,
                "schedule": schedule.state_dict(),
                "scaler": scaler.state_dict(),
                "guard": guard.state(),
                **model_state(model, ema, optimizer),
            }

        return Pause(epoch, metrics, account["quarantined"], state, data.classes, confusion)

    for epoch, train_batches, val_batches in zip(range(first_epoch, job.train.epochs), train_epochs, val_epochs, strict=True):
        start = time.perf_counter()
        batches = TimedBatches(train_batches)
        account = EpochAccount(decoder, worker.rank, worker.world_size, worker.device)
        if resume is not None and resume["account"] is not None and epoch == first_epoch:
            account.restore(resume["account"])
        if epoch in (first_epoch, job.train.finetune.freeze_epochs):
            train_parts(model, optimizer, head, head_only=epoch < job.train.finetune.freeze_epochs)
            replica = replicate(model, job.train, worker.device)  # DDP is to know which parameters have gradients
        set_train_mode(replica)
        for batch in batches:
            step = steps_done % plan.steps_per_epoch
            outputs = []
            is_accepted = not any(steps_done in steps for steps in rolled_back)
            if is_accepted:
                _seed_step(job.seed, steps_done, worker)
                mix = draw_mix(job.train, batch, [job.seed, epoch, step, worker.rank], worker.device)
                optimizer.zero_grad(set_to_none=True)
                for part, inputs in enumerate(Inputs.of(batch, mix, worker.device).split(job.train.accumulate), start=1):
                    with gradient_sync(replica, is_last=part == job.train.accumulate):
                        outputs.append(forward(replica, inputs, job.train.label_smoothing))
                        # DDP averages gradients over ranks; this makes that average the mean over all samples that count.
                        loss = (outputs[-1].losses * inputs.is_valid).sum() * worker.world_size / plan.num_valid(step)
                        scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                is_accepted = guard.accepts(steps_done, clip_gradients(model, job.train.grad_clip_norm))
                if is_accepted:
                    scaler.step(optimizer)
                    if ema is not None:
                        ema.update_parameters(model)
                scaler.update()
            schedule.step()
            account.add(step, batch, BatchOutput.join(outputs) if is_accepted else None)
            steps_done += 1
            is_asked = after_step(StepEnd(epoch, step, plan.steps_per_epoch, account, batches))
            if (is_asked or _is_pause_due(job, steps_done)) and step + 1 < plan.steps_per_epoch:
                guard.check()
                yield pause(epoch, {}, account.reduce())
        guard.check()
        train_s = time.perf_counter() - start
        whole = account.reduce()
        metrics = epoch_metrics(whole)
        _check(metrics, whole, job, plan, epoch)

        evaluation = Evaluation({}, None)
        if validates:
            evaluation = evaluate(_evaluated(model, ema), val_batches, forward, "val", len(data.classes), job.train.eval_flip)
        metrics |= evaluation.metrics
        metrics |= {
            "epoch": epoch,
            "train_rollbacks": sum(steps[-1] // plan.steps_per_epoch == epoch for steps in rolled_back),
            "images_per_s": batches.count * plan.global_batch_size / train_s,
            "data_wait_fraction": batches.wait_s / train_s,
            "first_batch_s": batches.first_batch_s,
            "epoch_s": time.perf_counter() - start,
            "learning_rate": max(float(rate) for rate in schedule.get_last_lr()),
        }
        yield pause(epoch, metrics, whole, evaluation.confusion)


def set_up_process(job: JobConfig, worker: Worker) -> None:
    """Seed this process (all ranks alike, so that the replicas start equal) and set its threads."""
    torch.manual_seed(job.seed)
    torch.set_num_threads(worker.threads)
    torch.use_deterministic_algorithms(job.train.deterministic)
    torch.backends.cudnn.benchmark = not job.train.deterministic
    torch.set_float32_matmul_precision("high")


def _seed_step(seed: int, step: int, worker: Worker) -> None:
    """Let dropout and the like draw from (seed, step, rank) alone, so that a resumed run draws as an undisturbed one."""
    number = int(np.random.SeedSequence([seed, step, worker.rank]).generate_state(1, np.uint32)[0])
    torch.default_generator.manual_seed(number)  # `torch.manual_seed` sees to all kinds of devices, which takes longer than a small step
    if worker.device.type == "cuda":
        torch.cuda.manual_seed(number)


def _is_pause_due(job: JobConfig, steps_done: int) -> bool:
    every = job.train.checkpoint_every_steps
    return every is not None and steps_done % every == 0


class Forward:
    """Brings a batch through a network, in the precision of the job."""

    def __init__(self, device: torch.device, preprocessing: Preprocessing, precision: str) -> None:
        self.device = device
        self._preprocessing = preprocessing
        if precision == "auto":
            precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self._autocast: AbstractContextManager[Any] = nullcontext() if dtype is None else torch.autocast(device.type, dtype)

    def __call__(self, network: nn.Module, inputs: Inputs, label_smoothing: float) -> BatchOutput:
        with self._autocast:
            outputs = network(normalize(inputs.images, self._preprocessing))
            num_classes = (outputs[0] if isinstance(outputs, tuple) else outputs).shape[1]
            losses, logits = sample_losses(outputs, inputs.labels(num_classes), label_smoothing)
        return BatchOutput(losses, logits, inputs.dominant(), inputs.is_valid)


@dataclass(frozen=True)
class Evaluation:
    """Of a pass over a split, exact over all ranks.

    Attributes:
        metrics: `{prefix}_loss`, `_top1`, `_top5`, `_mean_class_recall`, `_worst_class_recall` (fractions), `_samples` and
            `_quarantined`; with mirror images, `_loss_flip`, `_top1_flip` and `_top5_flip` besides.
        confusion: int64 [C, C], true classes down and predicted ones across; None where there are too many classes.
    """

    metrics: dict[str, float]
    confusion: NDArray[np.int64] | None


@torch.no_grad()  # inference mode would leave sharded parameters unfit for training
def evaluate(model: nn.Module, batches: Iterator[Batch], forward: Forward, prefix: str, num_classes: int, flip: bool = False) -> Evaluation:
    """Evaluate on one pass; with `flip`, a second time by the mean logits of each picture and its mirror image."""
    model.eval()
    share_buffers(model)
    totals, flip_totals, confusion = Totals(forward.device), Totals(forward.device), Confusion(num_classes, forward.device)
    for batch in batches:
        inputs = Inputs.of(batch, None, forward.device)
        output = forward(model, inputs, label_smoothing=0.0)
        totals.add(output, int(batch.is_bad.sum()))
        confusion.add(output)
        if flip:
            mirrored = forward(model, replace(inputs, images=inputs.images.flip(2)), label_smoothing=0.0)
            losses, logits = sample_losses((output.logits + mirrored.logits) / 2, inputs.targets, label_smoothing=0.0)
            flip_totals.add(replace(output, losses=losses, logits=logits), num_bad=0)
    metrics, matrix = rates(totals.reduce(), prefix), confusion.reduce()
    if matrix is not None:
        metrics |= class_metrics(matrix, prefix)
    if flip:
        flipped = rates(flip_totals.reduce(), prefix)
        metrics |= {f"{prefix}_{name}_flip": flipped[f"{prefix}_{name}"] for name in ("loss", "top1", "top5")}
    return Evaluation(metrics, matrix)


def eval_stream(job: JobConfig, uri: str, worker: Worker) -> BatchStream:
    """Return this rank's part of a split, unshuffled, for evaluation."""
    manifest = load_manifest(uri)
    plan = EpochPlan.of(manifest, job.train.global_batch_size, job.data.lanes, job.data.shuffle_window, seed=None)
    decoder = WindowDecoder((uri,), plan, Preprocessing.of(job.data), augment=None, read_options=(ReadOptions.of(manifest, job.data),))
    return BatchStream(decoder, worker.rank, worker.world_size, _decoding(job, (manifest,), worker, worker.eval_decode))


def _decoding(job: JobConfig, manifests: Sequence[Manifest], worker: Worker, tasks: DecodeResources) -> DecodeResources | None:
    """Return what the tasks that decode may use; None: the worker decodes."""
    where = job.data.decode
    if where == "auto":
        is_small = job.data.image_size <= SMALL_PX and max(manifest.bytes_per_picture for manifest in manifests) <= SMALL_BYTES
        where = "worker" if is_small and worker.device.type == "cpu" else "cluster"
    return tasks if where == "cluster" else None


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
