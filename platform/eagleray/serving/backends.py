"""The ways to compute one network's probabilities, and which of them is the fastest here.

What a back end compiles is made in the replica from the verified weights; no compiled file is ever loaded.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from eagleray.config.schema import BACKENDS, BackendName, ServingConfig
from eagleray.data.transforms import Preprocessing, normalize
from eagleray.errors import ServingError

if TYPE_CHECKING:
    from torch import nn

REFERENCE: BackendName = "torch-fp32"
"""What all others' probabilities are compared with; the network as it was trained and evaluated."""

MAX_THREADS = 8
"""Of a replica's model: small batches gain nothing from more."""

NUM_PICTURES = 64
"""Pictures whose probabilities are compared."""

PART = 16
"""Of them, computed at a time: large networks need much memory for more."""

ROUNDS = 2
MEASURE_S = 0.2
"""Least time that one size of batch is measured for in each round."""

SIZE_BUDGET_S = 8.0
"""Time after which no further round with one size of batch is begun."""

Compute = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""uint8 [N, S, S, 3] → probabilities, float32 [N, C]."""


class Measured(BaseModel):
    """What came of trying one back end."""

    backend: BackendName
    images_per_s: dict[int, float] = {}
    """By size of batch."""
    drift: float | None = None
    """Largest difference of a probability from the reference's."""
    refused: str | None = None
    """Why it was not taken into account."""


class BackendChoice(BaseModel):
    """The back end of a version, and what it was chosen by."""

    backend: BackendName
    measured: list[Measured] = []

    @property
    def speed_up(self) -> float | None:
        """Times as many pictures per second as the reference, geometric mean over the sizes of batches; None: not measured."""
        rates = {row.backend: row.images_per_s for row in self.measured if row.images_per_s}
        if self.backend not in rates or REFERENCE not in rates:
            return None
        return _speed(rates[self.backend]) / _speed(rates[REFERENCE])


def build(backend: BackendName, model: nn.Module, preprocessing: Preprocessing, num_threads: int) -> Compute:
    """Return how `model` (in evaluation mode, on the CPU) is computed by a back end.

    Raises:
        Exception: of whatever kind, where the back end cannot take this network.
    """
    if backend.startswith("torch"):
        return _torch(model, preprocessing, is_bf16=backend == "torch-bf16")
    return _openvino(model, preprocessing, num_threads, is_bf16=backend == "openvino-bf16")


def choose(
    wanted: BackendName | Literal["auto"],
    model: nn.Module,
    preprocessing: Preprocessing,
    num_threads: int,
    max_batch_size: int,
    tolerance: float,
) -> BackendChoice:
    """Try the back end `wanted`, or all of them with `auto`, and return the fastest whose probabilities are right.

    Args:
        tolerance: largest difference of a probability from the reference's that is borne.

    Raises:
        ServingError: the one that is asked for by name cannot be had, or is off by more than `tolerance`.
    """
    pictures = sample_pictures(preprocessing.image_size)
    computes: dict[BackendName, Compute] = {REFERENCE: build(REFERENCE, model, preprocessing, num_threads)}
    rows = {REFERENCE: Measured(backend=REFERENCE, drift=0.0)}
    expected = _in_parts(computes[REFERENCE], pictures)
    tried = BACKENDS if wanted == "auto" else (wanted,)
    for backend in (backend for backend in tried if backend != REFERENCE):
        rows[backend] = row = Measured(backend=backend)
        try:
            compute = build(backend, model, preprocessing, num_threads)
            row.drift = float(np.abs(_in_parts(compute, pictures) - expected).max())
        except Exception as error:  # whatever an exporter may meet in a network
            row.refused = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if not row.drift <= tolerance:  # nor where it is no number
            row.refused = f"its probabilities differ by up to {row.drift:.3g}, more than serve.backend_tolerance {tolerance:g}"
            continue
        computes[backend] = compute
    if wanted != "auto" and wanted not in computes:
        raise ServingError(f"serve.backend {wanted}: {rows[wanted].refused}; set serve.backend: auto")
    sizes = sorted({1, min(8, max_batch_size), max_batch_size})
    _measure(computes, rows, sizes, preprocessing.image_size)
    best = max(computes, key=lambda backend: _speed(rows[backend].images_per_s)) if wanted == "auto" else wanted
    return BackendChoice(backend=best, measured=list(rows.values()))


def choose_for_package(uri: str, config: ServingConfig, num_replicas: int) -> BackendChoice:
    """Load and verify the package at `uri`, and `choose` as `config` says, with a replica's share of this machine's cores.

    Raises:
        RegistryError: no package there, it does not verify, or nobody trusted has signed it.
        ServingError: as `choose` does.
    """
    import torch

    from eagleray.artifacts.package import load_package

    card, model = load_package(uri, config.trusted_keys)
    num_threads = share_of_cores(num_replicas)
    torch.set_num_threads(num_threads)
    return choose(config.backend, model, card.preprocessing, num_threads, config.max_batch_size, config.backend_tolerance)


def share_of_cores(num_replicas: int) -> int:
    """Return the threads of a replica's model where so many replicas share this machine's cores."""
    return min(MAX_THREADS, max(1, len(os.sched_getaffinity(0)) // num_replicas))


def sample_pictures(size: int) -> NDArray[np.uint8]:
    """Return uint8 [NUM_PICTURES, S, S, 3], the same ones each time: noise with the spectrum of natural pictures.

    Amplitudes fall with 1/frequency (Field 1987, "Relations between the statistics of natural images and the response
    properties of cortical cells"); brightness, contrast and colour vary from picture to picture.
    """
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij"))
    frequency[0, 0] = np.inf
    noise = rng.standard_normal((NUM_PICTURES, 3, size, size))
    waves = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(size, size))
    waves /= waves.std(axis=(2, 3), keepdims=True) + 1e-12
    shared = rng.uniform(0, 1, (NUM_PICTURES, 1, 1, 1))  # how grey a picture is
    waves = shared * waves[:, :1] + (1 - shared) * waves
    contrast, brightness = rng.uniform(20, 80, (NUM_PICTURES, 1, 1, 1)), rng.uniform(60, 200, (NUM_PICTURES, 3, 1, 1))
    return (brightness + contrast * waves).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1).copy()


def _in_parts(compute: Compute, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.concatenate([compute(part) for part in np.split(pictures, len(pictures) // PART)])


def _measure(computes: dict[BackendName, Compute], rows: dict[BackendName, Measured], sizes: Sequence[int], image_size: int) -> None:
    """Time all back ends in turns, so that what disturbs the machine hits each of them; the best round counts.

    Large networks get fewer rounds.
    """
    for size in sizes:
        images = np.zeros((size, image_size, image_size, 3), np.uint8)
        for compute in computes.values():
            compute(images)  # the first pass of a size allocates
        deadline = time.monotonic() + SIZE_BUDGET_S
        for number in range(ROUNDS):
            if number and time.monotonic() > deadline:
                break
            for backend, compute in computes.items():
                rate = _rate(compute, images)
                rows[backend].images_per_s[size] = max(round(rate, 1), rows[backend].images_per_s.get(size, 0.0))


def _rate(compute: Compute, images: NDArray[np.uint8]) -> float:
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < MEASURE_S or not count:
        compute(images)
        count += len(images)
    return count / elapsed


def _speed(rates: dict[int, float]) -> float:
    return float(np.exp(np.mean(np.log(list(rates.values())))))


def _torch(model: nn.Module, preprocessing: Preprocessing, *, is_bf16: bool) -> Compute:
    import torch

    if is_bf16:
        model = copy.deepcopy(model).to(torch.bfloat16)
    network = model.to(memory_format=torch.channels_last)

    def compute(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            inputs = normalize(torch.from_numpy(images), preprocessing)
            logits = network(inputs.to(torch.bfloat16) if is_bf16 else inputs)
            result: NDArray[np.float32] = torch.softmax(logits.float(), dim=1).numpy()
        return result

    return compute


def _openvino(model: nn.Module, preprocessing: Preprocessing, num_threads: int, *, is_bf16: bool) -> Compute:
    import openvino
    import torch

    class Whole(torch.nn.Module):
        """From pixels to probabilities, so that all of it is compiled."""

        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.network(normalize(images, preprocessing)).float(), dim=1)

    size = preprocessing.image_size
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that are fixed; wrong answers would be noticed
        graph = openvino.convert_model(Whole().eval(), example_input=example, input=[-1, size, size, 3])
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if is_bf16 else "f32",
        "INFERENCE_NUM_THREADS": num_threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()

    def compute(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = np.array(request.infer([images])[0], dtype=np.float32)
        return result

    return compute
