"""What computes a network: right answers whatever it is, and the choice among them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from eagleray.config.schema import BACKENDS, BackendName, ModelConfig, ServingConfig
from eagleray.data.transforms import Preprocessing, normalize
from eagleray.errors import ServingError
from eagleray.models.zoo import build_model
from eagleray.serving.backends import BackendChoice, Measured, build, choose, sample_pictures, threads_for

SIZE = 64
PREPROCESSING = Preprocessing(image_size=SIZE, eval_resize=SIZE)


def network(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(ModelConfig(name=name), 10, SIZE).eval()


@pytest.fixture(scope="module")
def pictures() -> NDArray[np.uint8]:
    return sample_pictures(SIZE)


@pytest.mark.parametrize("name", ["cnn", "resnet18", "googlenet", "convnext_tiny", "efficientnet_b0", "swin_t"])
def test_openvino_computes_what_torch_does(name: str, pictures: NDArray[np.uint8]):
    model = network(name)
    expected = build("torch-fp32", model, PREPROCESSING, 1)(pictures)
    compute = build("openvino-fp32", model, PREPROCESSING, 1)
    assert np.abs(compute(pictures) - expected).max() < 1e-4
    assert np.abs(compute(pictures[:3]) - expected[:3]).max() < 1e-4  # batches of any size


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_are_a_copy_that_the_next_batch_leaves_alone(backend: BackendName, pictures: NDArray[np.uint8]):
    compute = build(backend, network("cnn"), PREPROCESSING, 1, pictures)
    first = compute(pictures[:2])
    kept = first.copy()
    compute(pictures[2:4])
    assert first.dtype == np.float32 and first.shape == (2, 10)
    assert np.array_equal(first, kept)
    assert np.allclose(first.sum(axis=1), 1, atol=1e-3)


def test_a_back_end_that_is_off_is_refused_with_its_figures():
    choice = choose(ServingConfig(backend="auto", max_batch_size=2, backend_tolerance=1e-12), network("cnn"), PREPROCESSING, 1)
    assert choice.backend == "torch-fp32"
    refused = {row.backend: row.refused for row in choice.measured if row.refused}
    assert set(refused) == set(BACKENDS) - {"torch-fp32", "openvino-int8"}
    assert all("more than serve.backend_tolerance 1e-12" in reason or "times as long" in reason for reason in refused.values())
    assert "more than serve.backend_tolerance 1e-12" in refused["openvino-fp32"]
    with pytest.raises(
        ServingError, match=r"serve.backend torch-bf16: .* more than serve.backend_tolerance 1e-12; set serve.backend: auto"
    ):
        choose(ServingConfig(backend="torch-bf16", max_batch_size=2, backend_tolerance=1e-12), network("cnn"), PREPROCESSING, 1)


class _Unexportable(torch.nn.Module):
    """Leaves what can be traced, as users' networks may."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = torch.from_numpy(np.sort(images.float().detach().numpy().mean(axis=(2, 3)), axis=1))
        return torch.cat([means, 3 * means], dim=1)


def test_a_network_that_cannot_be_exported_is_served_as_it_is():
    choice = choose(ServingConfig(backend="auto", max_batch_size=2, backend_tolerance=0.05), _Unexportable(), PREPROCESSING, 1)
    rows = {row.backend: row for row in choice.measured}
    assert choice.backend.startswith("torch")
    assert rows["openvino-fp32"].refused and not rows["openvino-fp32"].images_per_s


def test_the_fastest_is_chosen_by_batches_of_all_sizes():
    choice = choose(ServingConfig(backend="auto", max_batch_size=16, backend_tolerance=0.1), network("cnn"), PREPROCESSING, 1)
    rates = {row.backend: row.images_per_s for row in choice.measured if not row.refused}
    assert all(set(measured) == {1, 8, 16} for measured in rates.values())
    assert choice.backend == max(rates, key=lambda backend: np.prod(list(rates[backend].values())))
    assert choice.speed_up is not None and choice.speed_up >= 1


def test_other_weights_of_a_network_are_tried_with_what_was_chosen_before_alone():
    config = ServingConfig(backend="auto", max_batch_size=2, backend_tolerance=0.1)
    rates = {1: 30.0, 2: 50.0}
    like = BackendChoice(backend="openvino-fp32", measured=[Measured(backend="openvino-fp32", images_per_s=rates)])
    choice = choose(config, network("cnn", seed=1), PREPROCESSING, 1, like=like)
    assert choice.backend == "openvino-fp32"
    assert {row.backend: row.images_per_s for row in choice.measured} == {"torch-fp32": {}, "openvino-fp32": rates}
    assert choice.measured[1].drift is not None and choice.measured[1].drift < 1e-4


def test_where_it_is_not_right_for_the_new_weights_all_are_tried():
    config = ServingConfig(backend="auto", max_batch_size=2, backend_tolerance=1e-12)
    choice = choose(config, network("cnn"), PREPROCESSING, 1, like=BackendChoice(backend="openvino-fp32"))
    assert choice.backend == "torch-fp32"
    assert {row.backend for row in choice.measured} == set(BACKENDS) - {"openvino-int8"}


def test_a_small_network_gets_one_thread_and_a_large_one_all():
    before = torch.get_num_threads()
    large, at_224_px = build_model(ModelConfig(name="resnet50"), 10, 224).eval(), Preprocessing(image_size=224, eval_resize=224)
    try:
        assert threads_for(build_model(ModelConfig(name="cnn"), 10, 32).eval(), DIGITS, 2) == torch.get_num_threads() == 1
        assert threads_for(large, at_224_px, 2) == torch.get_num_threads() == 2
        assert threads_for(large, at_224_px, 1) == 1
    finally:
        torch.set_num_threads(before)


def test_pictures_are_the_same_each_time_and_differ_from_each_other(pictures: NDArray[np.uint8]):
    assert pictures.shape == (64, SIZE, SIZE, 3) and pictures.dtype == np.uint8
    assert np.array_equal(pictures, sample_pictures(SIZE))
    neighbours = np.corrcoef(pictures[..., :-1, 0].ravel(), pictures[..., 1:, 0].ravel())[0, 1]
    assert neighbours > 0.7  # smooth, rather as photographs are than as noise is
    assert pictures.std(axis=(1, 2, 3)).min() > 5 and pictures.mean(axis=(1, 2, 3)).std() > 20


class _SlowInBf16(torch.nn.Module):
    """As networks are on processors without instructions for bf16. Counts pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)
        self.counts = {torch.float32: 0, torch.bfloat16: 0}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_tracing():
            self.counts[images.dtype] += len(images)
            time.sleep((0.002 if images.dtype == torch.float32 else 0.02) * len(images))
        return self.linear(images.mean(dim=(2, 3)))

    def __deepcopy__(self, memo: dict[int, object]) -> _SlowInBf16:
        copied = _SlowInBf16()
        copied.load_state_dict(self.state_dict())
        copied.counts = self.counts
        return copied


def test_a_back_end_that_is_far_too_slow_is_not_compared_in_full():
    model = _SlowInBf16().eval()
    choice = choose(ServingConfig(max_batch_size=1), model, PREPROCESSING, 1)
    refused = {row.backend: row.refused for row in choice.measured}
    assert refused["torch-bf16"] == "takes more than 4 times as long as torch-fp32" and refused["openvino-fp32"] is None
    assert model.counts[torch.bfloat16] == 48
    by_name = choose(ServingConfig(backend="torch-bf16", max_batch_size=1, backend_tolerance=0.1), model, PREPROCESSING, 1)
    assert by_name.backend == "torch-bf16"


DIGITS = Preprocessing(image_size=32, eval_resize=32)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.nn.Module, NDArray[np.uint8]]:
    """A network that knows digits, and 300 that it has not seen."""
    found = load_digits()
    grey = np.stack([cv2.resize(image, (32, 32)) for image in found.images]) * (255 / 16)
    order = np.random.default_rng(0).permutation(len(grey))  # one writer's digits follow another's
    images, labels = np.repeat(grey.astype(np.uint8)[order][..., None], 3, axis=3), torch.from_numpy(found.target[order])
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="cnn"), 10, 32)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for start in 4 * list(range(0, 1472, 32)):
        inputs = normalize(torch.from_numpy(images[start : start + 32]), DIGITS)
        loss = torch.nn.functional.cross_entropy(model(inputs), labels[start : start + 32])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    right = build("torch-fp32", model, DIGITS, 1)(images[1497:]).argmax(axis=1) == labels.numpy()[1497:]
    assert right.mean() > 0.9
    return model, images[1497:]


def test_int8_is_measured_and_taken_where_it_is_allowed_and_answers_alike(digits: tuple[torch.nn.Module, NDArray[np.uint8]]):
    model, pictures = digits
    by_name = ServingConfig(backend="openvino-int8", int8_agreement=0.97, max_batch_size=2)
    row = {row.backend: row for row in choose(by_name, model, DIGITS, 1, pictures).measured}["openvino-int8"]
    assert row.refused is None and set(row.images_per_s) == {1, 2}
    assert row.agreement is not None and row.agreement >= 0.97
    assert row.drift is not None and row.drift > 1e-4  # it is int8 indeed

    expected = build("torch-fp32", model, DIGITS, 1)(pictures)
    compute = build("openvino-int8", model, DIGITS, 1, pictures[:60])
    assert (compute(pictures).argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.97
    assert np.allclose(compute(pictures[:3]), compute(pictures)[:3], atol=1e-4)  # batches of any size

    tried = {row.backend for row in choose(ServingConfig(int8_agreement=0.97, max_batch_size=1), model, DIGITS, 1, pictures).measured}
    assert tried == set(BACKENDS)
    tried = {row.backend for row in choose(ServingConfig(max_batch_size=1), model, DIGITS, 1, pictures).measured}
    assert tried == set(BACKENDS) - {"openvino-int8"}


def test_int8_that_changes_too_many_classes_is_refused_with_its_figures(digits: tuple[torch.nn.Module, NDArray[np.uint8]]):
    model, pictures = digits
    black = np.zeros_like(pictures[:100])  # by which it is calibrated: nothing of what follows fits into such ranges
    config = ServingConfig(backend="openvino-int8", int8_agreement=0.98, max_batch_size=1)
    with pytest.raises(
        ServingError, match=r"openvino-int8: \d.*% of the pictures keep their class, fewer than serve.int8_agreement 0.98; set"
    ):
        choose(config, model, DIGITS, 1, np.concatenate([black, pictures[100:]]))


def test_int8_needs_pictures_to_be_calibrated_by():
    config = ServingConfig(backend="openvino-int8", int8_agreement=0.9, max_batch_size=1)
    with pytest.raises(
        ServingError, match=r"the package holds no pictures to calibrate it by; register the model again with data.examples"
    ):
        choose(config, network("cnn"), PREPROCESSING, 1)
    choice = choose(ServingConfig(int8_agreement=0.9, max_batch_size=1), network("cnn"), PREPROCESSING, 1)
    assert "no pictures" in str({row.backend: row for row in choice.measured}["openvino-int8"].refused)


def test_back_ends_are_compared_on_the_packages_pictures(digits: tuple[torch.nn.Module, NDArray[np.uint8]]):
    model, pictures = digits
    config = ServingConfig(backend="openvino-bf16", max_batch_size=1, backend_tolerance=1.0)
    by_theirs, by_made_up = (choose(config, model, DIGITS, 1, examples).measured[1].drift for examples in (pictures, None))
    assert by_theirs != by_made_up


def test_nobody_is_told_that_networks_are_compiled(tmp_path: Path):
    program = """
import sys
import torch
from eagleray.data.transforms import Preprocessing
from eagleray.serving.backends import build, sample_pictures
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 14 * 14, 2)).eval()
build("openvino-int8", model, Preprocessing(image_size=16, eval_resize=16), 1, sample_pictures(16))
assert sys.modules["openvino_telemetry"] is None
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert not (tmp_path / "intel").exists()  # where the telemetry keeps the number that it calls a user by
    assert ran.stdout == ""
