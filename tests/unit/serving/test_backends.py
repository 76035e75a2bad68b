"""What computes a network: right answers whatever it is, and the choice among them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eagleray.config.schema import BACKENDS, BackendName, ModelConfig
from eagleray.data.transforms import Preprocessing
from eagleray.errors import ServingError
from eagleray.models.zoo import build_model
from eagleray.serving.backends import build, choose, sample_pictures

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
    compute = build(backend, network("cnn"), PREPROCESSING, 1)
    first = compute(pictures[:2])
    kept = first.copy()
    compute(pictures[2:4])
    assert first.dtype == np.float32 and first.shape == (2, 10)
    assert np.array_equal(first, kept)
    assert np.allclose(first.sum(axis=1), 1, atol=1e-3)


def test_a_back_end_that_is_off_is_refused_with_its_figures():
    choice = choose("auto", network("cnn"), PREPROCESSING, 1, max_batch_size=2, tolerance=1e-12)
    assert choice.backend == "torch-fp32"
    refused = {row.backend: row.refused for row in choice.measured if row.refused}
    assert set(refused) == set(BACKENDS) - {"torch-fp32"}
    assert all("more than serve.backend_tolerance 1e-12" in reason for reason in refused.values())
    with pytest.raises(
        ServingError, match=r"serve.backend torch-bf16: .* more than serve.backend_tolerance 1e-12; set serve.backend: auto"
    ):
        choose("torch-bf16", network("cnn"), PREPROCESSING, 1, max_batch_size=2, tolerance=1e-12)


class _Unexportable(torch.nn.Module):
    """Leaves what can be traced, as users' networks may."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = torch.from_numpy(np.sort(images.float().detach().numpy().mean(axis=(2, 3)), axis=1))
        return torch.cat([means, 3 * means], dim=1)


def test_a_network_that_cannot_be_exported_is_served_as_it_is():
    choice = choose("auto", _Unexportable(), PREPROCESSING, 1, max_batch_size=2, tolerance=0.05)
    rows = {row.backend: row for row in choice.measured}
    assert choice.backend.startswith("torch")
    assert rows["openvino-fp32"].refused and not rows["openvino-fp32"].images_per_s


def test_the_fastest_is_chosen_by_batches_of_all_sizes():
    choice = choose("auto", network("cnn"), PREPROCESSING, 1, max_batch_size=16, tolerance=0.1)
    rates = {row.backend: row.images_per_s for row in choice.measured if not row.refused}
    assert all(set(measured) == {1, 8, 16} for measured in rates.values())
    assert choice.backend == max(rates, key=lambda backend: np.prod(list(rates[backend].values())))
    assert choice.speed_up is not None and choice.speed_up >= 1


def test_pictures_are_the_same_each_time_and_differ_from_each_other(pictures: NDArray[np.uint8]):
    assert pictures.shape == (64, SIZE, SIZE, 3) and pictures.dtype == np.uint8
    assert np.array_equal(pictures, sample_pictures(SIZE))
    neighbours = np.corrcoef(pictures[..., :-1, 0].ravel(), pictures[..., 1:, 0].ravel())[0, 1]
    assert neighbours > 0.7  # smooth, rather as photographs are than as noise is
    assert pictures.std(axis=(1, 2, 3)).min() > 5 and pictures.mean(axis=(1, 2, 3)).std() > 20
