"""Mixup and CutMix are torchvision's, the same for the same step, and leave rows that do not count alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, ks_2samp, kstest
from torch.nn.functional import cross_entropy, one_hot
from torchvision.transforms import v2

from eagleray.config.schema import TrainingConfig
from eagleray.data.stream import Batch
from eagleray.data.transforms import Preprocessing, normalize
from eagleray.training.loop import Forward
from eagleray.training.metrics import Totals, rates
from eagleray.training.mixing import Inputs, Mix, draw_mix
from eagleray.training.recipe import sample_losses

CPU = torch.device("cpu")
NUM_CLASSES = 5
SIZE = 16
PREPROCESSING = Preprocessing(image_size=SIZE, eval_resize=SIZE)


def batch_of(is_valid: list[bool], size: int = SIZE) -> Batch:
    rows = len(is_valid)
    generator = torch.Generator().manual_seed(0)
    return Batch(
        images=torch.randint(0, 256, (rows, size, size, 3), dtype=torch.uint8, generator=generator),
        targets=torch.arange(rows) % NUM_CLASSES,
        is_valid=torch.tensor(is_valid),
        sample_ids=np.arange(rows),
        is_bad=np.zeros(rows, np.bool_),
    )


BATCH = batch_of([True] * 8)


def mix_of(kind: str, seed: int, batch: Batch = BATCH, alpha: float = 1.0) -> Mix:
    mix = draw_mix(TrainingConfig(**{f"{kind}_alpha": alpha}), batch, [seed], CPU)
    assert mix is not None
    return mix


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_pictures_and_labels_are_mixed_as_by_torchvision(kind: str, seed: int) -> None:
    mix = mix_of(kind, seed)
    before = BATCH.images.clone()
    transform: Any = (v2.MixUp if kind == "mixup" else v2.CutMix)(num_classes=NUM_CLASSES)
    transform.make_params = lambda _: {"lam": mix.weight, "lam_adjusted": mix.weight, "box": mix.box}
    images, labels = transform(normalize(BATCH.images, PREPROCESSING), BATCH.targets)
    mixed = normalize(mix.images(BATCH.images), PREPROCESSING)
    torch.testing.assert_close(mixed, images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mix.probabilities(BATCH.targets, NUM_CLASSES), labels)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert (BATCH.images == before).all()


def test_weights_and_boxes_have_torchvisions_distribution() -> None:
    weights = [mix_of("mixup", seed, alpha=0.3).weight for seed in range(3000)]
    assert kstest(weights, beta(0.3, 0.3).cdf).pvalue > 0.001
    large = batch_of([True] * 2, size=224)
    ours = [mix_of("cutmix", seed, large) for seed in range(3000)]
    torch.manual_seed(0)
    transform, pictures = v2.CutMix(alpha=1.0, num_classes=NUM_CLASSES), torch.empty(2, 3, 224, 224)
    theirs = [transform.make_params([pictures]) for _ in range(3000)]
    assert ks_2samp([mix.weight for mix in ours], [params["lam_adjusted"] for params in theirs]).pvalue > 0.001
    for side in range(4):
        assert ks_2samp([mix.box[side] for mix in ours if mix.box], [params["box"][side] for params in theirs]).pvalue > 0.001


def test_with_both_on_each_batch_gets_one_of_them_and_with_neither_none() -> None:
    both = TrainingConfig(mixup_alpha=0.2, cutmix_alpha=1.0)
    mixes = [draw_mix(both, BATCH, [0, 1, step, 0], CPU) for step in range(1000)]
    num_cutmix = sum(mix is not None and mix.box is not None for mix in mixes)
    assert None not in mixes and 430 < num_cutmix < 570
    assert draw_mix(TrainingConfig(), BATCH, [0], CPU) is None


def test_the_draw_depends_on_the_seed_alone() -> None:
    config = TrainingConfig(mixup_alpha=0.2, cutmix_alpha=1.0)
    draws = []
    for state in (1, 2):
        torch.manual_seed(state)
        np.random.seed(state)
        draws.append(
            [draw_mix(config, BATCH, seed, CPU) for seed in ([7, 0, 3, 0], [7, 0, 3, 1], [7, 0, 4, 0], [7, 1, 3, 0], [8, 0, 3, 0])]
        )
    weights = [[mix.weight for mix in drawn if mix is not None] for drawn in draws]
    assert weights[0] == weights[1] and len(set(weights[0])) == 5


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_rows_that_do_not_count_are_mixed_with_no_other(kind: str) -> None:
    is_valid = [True, False, True, True, False, False, True, False]
    batch = batch_of(is_valid)
    mix = mix_of(kind, 3, batch)
    assert mix.partners.tolist() == [6, 1, 0, 2, 4, 5, 3, 7]
    mixed = mix.images(batch.images).float()
    for row in (1, 4, 5, 7):
        torch.testing.assert_close(mixed[row], batch.images[row].float())
        assert mix.probabilities(batch.targets, NUM_CLASSES)[row].tolist() == one_hot(batch.targets, NUM_CLASSES)[row].tolist()
    others = copy.deepcopy(batch)
    others.images[[1, 4, 5, 7]] = 0
    others.targets[[1, 4, 5, 7]] = 0
    valid = batch.is_valid
    assert (mix.images(others.images)[valid].float() == mixed[valid]).all()
    assert (mix.probabilities(others.targets, NUM_CLASSES)[valid] == mix.probabilities(batch.targets, NUM_CLASSES)[valid]).all()


@pytest.mark.parametrize("num_valid", [0, 1])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_row_without_a_partner_stays_as_it_is(kind: str, num_valid: int) -> None:
    batch = batch_of([row < num_valid for row in range(4)])
    mix = mix_of(kind, 0, batch)
    torch.testing.assert_close(mix.images(batch.images).float(), batch.images.float())
    assert (mix.probabilities(batch.targets, NUM_CLASSES) == one_hot(batch.targets, NUM_CLASSES)).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_and_its_gradient_are_those_of_the_mixed_labels(label_smoothing: float) -> None:
    """Cross-entropy with labels mixed, then smoothed, by hand; an auxiliary head counts likewise."""
    mix = mix_of("mixup", 1)
    heads = [torch.randn(8, NUM_CLASSES, generator=torch.Generator().manual_seed(seed), requires_grad=True) for seed in (0, 1)]
    losses, logits = sample_losses((heads[0], heads[1]), mix.probabilities(BATCH.targets, NUM_CLASSES), label_smoothing)
    gradients = torch.autograd.grad(losses.sum(), heads)

    hard = one_hot(BATCH.targets, NUM_CLASSES).float()
    labels = mix.weight * hard + (1 - mix.weight) * hard.roll(1, 0)
    labels = (1 - label_smoothing) * labels + label_smoothing / NUM_CLASSES
    expected = cross_entropy(heads[0], labels, reduction="none") + 0.3 * cross_entropy(heads[1], labels, reduction="none")
    torch.testing.assert_close(losses, expected)
    for gradient, theirs in zip(gradients, torch.autograd.grad(expected.sum(), heads), strict=True):
        torch.testing.assert_close(gradient, theirs)
    assert logits is heads[0]


class LabelReader(torch.nn.Module):
    """Sure of the class that the top left pixel's red value names."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red = images[:, 0, 0, 0] * 255 * PREPROCESSING.std[0] + 255 * PREPROCESSING.mean[0]
        return 20.0 * one_hot(red.round().long(), NUM_CLASSES).float()


@pytest.mark.parametrize("weight", [0.9, 0.1])
def test_training_accuracy_counts_the_dominant_label_of_valid_rows(weight: float) -> None:
    """A mix of which the network sees the first row's pixel: right where the label's own share is the larger."""
    batch = batch_of([True] * 6 + [False] * 2)
    batch.images[:, 0, 0] = batch.targets[:, None].to(torch.uint8)
    partners = torch.tensor([5, 0, 1, 2, 3, 4, 6, 7])
    mix = Mix(partners, weight, box=(4, 4, 8, 8))
    totals = Totals(CPU)
    totals.add(Forward(CPU, PREPROCESSING, "fp32")(LabelReader(), Inputs.of(batch, mix, CPU), 0.0), num_bad=0)
    metrics = rates(totals.reduce(), "train")
    # Targets 0 1 2 3 4 0: the first row's partner is of the same class.
    assert metrics["train_top1"] == pytest.approx(1.0 if weight > 0.5 else 1 / 6)
    assert metrics["train_samples"] == 6
