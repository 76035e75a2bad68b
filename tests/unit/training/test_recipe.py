"""Schedules, scaling, sizes and optimizers are what their sources say; metrics are exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_score, recall_score
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, OneCycleLR, SequentialLR, StepLR

from eagleray.config.load import build_job
from eagleray.config.schema import JobConfig, OptimizerConfig, ScheduleConfig, TrainingConfig, TrainSize
from eagleray.data.stream import Batch
from eagleray.data.transforms import Preprocessing, normalize
from eagleray.training.loop import Forward, evaluate
from eagleray.training.metrics import BatchOutput, Confusion, Totals, class_metrics, class_rates
from eagleray.training.recipe import build_optimizer, build_schedule

EPOCHS, STEPS = 10, 7


def job_of(*overrides: str) -> JobConfig:
    return build_job({"name": "test", "data": {"train": "a", "val": "b"}}, list(overrides))


def rates_of(schedule: LRScheduler, optimizer: torch.optim.Optimizer) -> list[float]:
    rates = []
    for _ in range(EPOCHS * STEPS):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return rates


def optimizer_of() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)


def ours(**values: Any) -> list[float]:
    optimizer = optimizer_of()
    return rates_of(build_schedule(optimizer, ScheduleConfig(**values), EPOCHS, STEPS), optimizer)


@pytest.mark.parametrize("anneal", ["cosine", "linear"])
@pytest.mark.parametrize(("rise", "div_factor", "final_div_factor"), [(0.3, 25.0, 1e4), (0.5, 10.0, 100.0)])
def test_one_cycle_is_torchs(anneal: str, rise: float, div_factor: float, final_div_factor: float) -> None:
    optimizer = optimizer_of()
    theirs = OneCycleLR(
        optimizer,
        max_lr=2.0,
        total_steps=EPOCHS * STEPS,
        pct_start=rise,
        anneal_strategy={"cosine": "cos", "linear": "linear"}[anneal],  # type: ignore[arg-type]
        cycle_momentum=False,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
    )
    rates = ours(name="one_cycle", anneal=anneal, rise=rise, div_factor=div_factor, final_div_factor=final_div_factor)
    assert rates == pytest.approx(rates_of(theirs, optimizer))


@pytest.mark.parametrize("warmup_start", [0.01, 0.033])
def test_warm_up_and_cosine_are_those_of_torchvisions_reference_per_step(warmup_start: float) -> None:
    optimizer, warm = optimizer_of(), 2 * STEPS
    parts = [LinearLR(optimizer, warmup_start, total_iters=warm), CosineAnnealingLR(optimizer, EPOCHS * STEPS - warm)]
    theirs = SequentialLR(optimizer, parts, milestones=[warm])
    assert ours(name="cosine", warmup_epochs=2, warmup_start=warmup_start) == pytest.approx(rates_of(theirs, optimizer))


def test_steps_down_come_every_so_many_epochs() -> None:
    optimizer = optimizer_of()
    theirs = StepLR(optimizer, step_size=3 * STEPS, gamma=0.94)
    assert ours(name="step", warmup_epochs=0, step_epochs=3, step_decay=0.94) == pytest.approx(rates_of(theirs, optimizer))
    classic = ours(name="step", warmup_epochs=0, step_epochs=4)
    optimizer = optimizer_of()
    assert classic == pytest.approx(rates_of(MultiStepLR(optimizer, [4 * STEPS, 8 * STEPS]), optimizer))


def test_linear_is_ffcvs_cycle() -> None:
    """Interpolated between (0, 1e-4), (2, 1) and (the last epoch, 0), as in ffcv-imagenet's `get_cyclic_lr`."""
    epochs = np.arange(EPOCHS * STEPS) / STEPS
    expected = 2.0 * np.interp(epochs, [0, 2, EPOCHS], [1e-4, 1, 0])
    assert ours(name="linear", warmup_epochs=2, warmup_start=1e-4) == pytest.approx(expected.tolist())


def test_the_learning_rate_scales_with_the_global_batch() -> None:
    model = nn.Linear(2, 2)
    fixed = TrainingConfig(global_batch_size=1024, optimizer=OptimizerConfig(lr=0.1))
    scaled = TrainingConfig(global_batch_size=1024, optimizer=OptimizerConfig(lr=0.1, lr_batch_size=256))
    assert build_optimizer(model, fixed).defaults["lr"] == 0.1
    assert build_optimizer(model, scaled).defaults["lr"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ({"start": 160, "end": 192, "ramp_epochs": (11, 13)}, [160] * 12 + [192] * 4),  # 176 is 5.5 x 32: rounded to even
        ({"start": 128, "end": 224, "ramp_epochs": (1, 5)}, [128, 128, 160, 192, 192, 224, 224]),
        ({"start": 16, "end": 28, "ramp_epochs": (0, 3), "multiple": 4}, [16, 20, 24, 28]),
        ({"start": 100, "end": 110, "ramp_epochs": (0, 4)}, [100, 100, 100, 100, 110]),
        ({"start": 224, "end": 128, "ramp_epochs": (0, 2)}, [224, 192, 128]),
        ({"start": 176, "end": 176}, [176, 176]),
    ],
)
def test_the_size_of_training_pictures_is_a_function_of_the_epoch(values: dict[str, Any], sizes: list[int]) -> None:
    assert [TrainSize(**values).of_epoch(epoch) for epoch in range(len(sizes))] == sizes


def test_one_number_is_a_size_for_all_epochs() -> None:
    assert job_of("data.train_size=176").data.train_size == TrainSize(start=176, end=176)


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop", "lamb", "lion"])
def test_an_optimizer_goes_down_and_decays_matrices_only(name: str) -> None:
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), torch.randn(64, 4)
    targets = (images.sum(dim=1) > 0).long()
    optimizer = build_optimizer(model, TrainingConfig(optimizer=OptimizerConfig(name=name, lr=0.01, weight_decay=0.1)))  # type: ignore[arg-type]
    decayed = [[p for group in optimizer.param_groups if group["weight_decay"] == decay for p in group["params"]] for decay in (0.1, 0.0)]
    assert [p.ndim for p in decayed[0]] == [2, 2] and [p.ndim for p in decayed[1]] == [1, 1, 1, 1]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_lion_and_lamb_take_the_step_of_their_papers() -> None:
    """The first step: Lion's is the sign of the gradient, LAMB's the weights' norm along Adam's direction."""
    weights, gradient = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.5, -2.0]])
    moved = {}
    for name in ("lion", "lamb"):
        model = nn.Linear(2, 1, bias=False)
        model.weight.data.copy_(weights)
        optimizer = build_optimizer(model, TrainingConfig(optimizer=OptimizerConfig(name=name, lr=0.1, weight_decay=0.01)))  # type: ignore[arg-type]
        model.weight.grad = gradient.clone()
        optimizer.step()
        moved[name] = model.weight.detach()
    torch.testing.assert_close(moved["lion"], weights * (1 - 0.1 * 0.01) - 0.1 * gradient.sign())
    direction = gradient / (gradient.abs() + 1e-6) + 0.01 * weights
    torch.testing.assert_close(moved["lamb"], weights - 0.1 * direction * weights.norm() / direction.norm())


def test_confusion_recall_and_precision_are_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(90, 5, generator=generator), torch.randint(0, 4, (90,), generator=generator)
    is_valid = torch.arange(90) % 7 > 0
    confusion = Confusion(5, torch.device("cpu"))
    for rows in (slice(0, 40), slice(40, 90)):
        confusion.add(BatchOutput(torch.zeros(90)[rows], logits[rows], targets[rows], is_valid[rows]))
    matrix = confusion.reduce()
    assert matrix is not None
    true, predicted = targets[is_valid].numpy(), logits.argmax(1)[is_valid].numpy()
    assert (matrix == confusion_matrix(true, predicted, labels=range(5))).all()
    recall, precision = class_rates(matrix)
    assert recall[:4].tolist() == pytest.approx(recall_score(true, predicted, labels=range(4), average=None).tolist())
    assert precision.tolist() == pytest.approx(precision_score(true, predicted, labels=range(5), average=None).tolist())
    assert np.isnan(recall[4])  # no sample of that class: it counts in neither mean nor worst
    assert class_metrics(matrix, "val") == {
        "val_mean_class_recall": pytest.approx(recall[:4].mean()),
        "val_worst_class_recall": recall[:4].min(),
    }


def test_sums_are_the_same_bit_for_bit_in_whatever_order() -> None:
    generator = torch.Generator().manual_seed(0)
    losses, logits = torch.rand(4096, generator=generator).pow(8) * 1000, torch.randn(4096, 5, generator=generator)
    targets, is_valid = torch.randint(0, 5, (4096,), generator=generator), torch.ones(4096, dtype=torch.bool)
    sums = []
    for size in (1, 7, 4096):
        for order in (torch.arange(4096), torch.randperm(4096, generator=generator)):
            totals = Totals(torch.device("cpu"))
            for rows in order.split(size):
                totals.add(BatchOutput(losses[rows], logits[rows], targets[rows], is_valid[rows]), num_bad=0)
            sums.append(totals.reduce())
    assert all(other == sums[0] for other in sums)
    assert sums[0][0] == pytest.approx(float(losses.double().sum()), rel=1e-6)


def test_mirror_images_are_averaged_in_metrics_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    preprocessing = Preprocessing(image_size=6, eval_resize=6)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 4))
    images = torch.randint(0, 256, (40, 6, 6, 3), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 4, (40,), generator=generator)
    is_valid = torch.arange(40) != 7
    batch = Batch(images, targets, is_valid, np.arange(40), np.zeros(40, np.bool_))
    forward = Forward(torch.device("cpu"), preprocessing, "fp32")
    metrics = evaluate(network, iter([batch]), forward, "val", num_classes=4, flip=True).metrics

    logits = [network(normalize(part, preprocessing)) for part in (images, images.flip(2))]
    mean = (logits[0] + logits[1]) / 2
    for suffix, expected in (("", logits[0]), ("_flip", mean)):
        assert metrics[f"val_top1{suffix}"] == pytest.approx((expected.argmax(1) == targets)[is_valid].double().mean().item())
        loss = nn.functional.cross_entropy(expected[is_valid], targets[is_valid]).item()
        assert metrics[f"val_loss{suffix}"] == pytest.approx(loss, rel=1e-5)
    assert metrics["val_top1"] != metrics["val_top1_flip"]
    assert "val_top1_flip" not in evaluate(network, iter([batch]), forward, "val", num_classes=4).metrics
