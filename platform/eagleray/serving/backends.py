"""The ways to compute one network's probabilities, and which of them is the fastest here.

What a back end compiles is made in the replica from the verified weights; no compiled file is ever loaded.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

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

INT8: BackendName = "openvino-int8"

MAX_THREADS = 8
"""Of a replica's model: small batches gain nothing from more."""

SMALL_S = 0.004
"""Seconds for a picture on one core up to which a network gets no more of them: what else a request takes, on the same cores,
is more, and the threads of so short a computation spend their time waiting for each other."""

NUM_PICTURES = 64
"""Pictures whose probabilities are compared; all that there are where int8 is to be judged, which takes more."""

CALIBRATION_SHARE = 1 / 3
"""Of the package's pictures, which int8 is calibrated by; it is compared on the others."""

PART = 16
"""Of them, computed at a time: large networks need much memory for more."""

MAX_SLOWDOWN = 4.0
"""Times as long as the reference that a back end may take before the rest of the pictures is spared; it will not be the fastest."""

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
    agreement: float | None = None
    """Share of the pictures whose most probable class is the reference's."""
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


def build(
    backend: BackendName,
    model: nn.Module,
    preprocessing: Preprocessing,
    num_threads: int,
    examples: NDArray[np.uint8] | None = None,
) -> Compute:
    """Return how `model` (in evaluation mode, on the CPU) is computed by a back end.

    Args:
        examples: the package's pictures, uint8 [N, S, S, 3]; int8 is calibrated by the first of them.

    Raises:
        Exception: of whatever kind, where the back end cannot take this network.
    """
    if backend.startswith("torch"):
        return _torch(model, preprocessing, is_bf16=backend == "torch-bf16")
    graph = _exported(model, preprocessing)
    if backend == INT8:
        graph = _quantized(graph, _calibrates(examples))
    return _openvino(graph, num_threads, is_bf16=backend == "openvino-bf16")


def choose(
    config: ServingConfig,
    model: nn.Module,
    preprocessing: Preprocessing,
    num_threads: int,
    examples: NDArray[np.uint8] | None = None,
    like: BackendChoice | None = None,
) -> BackendChoice:
    """Try the back end that `config` names, or all of them with `auto`, and return the fastest whose answers are right.

    Args:
        examples: as of `build`; None: answers are compared on pictures that are made up, and there is no int8.
        like: what was chosen, on the same terms, for other weights of the same network. It is as fast for these; if its answers are
            right for them too, it is taken, and nothing else tried.

    Raises:
        ServingError: the one that is asked for by name cannot be had, or is off by more than `config` allows.
    """
    pictures = sample_pictures(preprocessing.image_size) if examples is None else _compares(examples, config)
    computes: dict[BackendName, Compute] = {REFERENCE: build(REFERENCE, model, preprocessing, num_threads)}
    rows = {REFERENCE: Measured(backend=REFERENCE, drift=0.0, agreement=1.0)}
    expected, picture_s = _in_parts(computes[REFERENCE], pictures)
    limit_s = MAX_SLOWDOWN * picture_s if config.backend == "auto" else math.inf

    def try_out(backend: BackendName) -> None:
        rows[backend] = row = Measured(backend=backend)
        try:
            compute = build(backend, model, preprocessing, num_threads, examples)
            found, _ = _in_parts(compute, pictures, limit_s)
            if len(found) < len(pictures):
                row.refused = f"takes more than {MAX_SLOWDOWN:g} times as long as {REFERENCE}"
                return
            row.drift = float(np.abs(found - expected).max())
            row.agreement = float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
        except Exception as error:  # whatever an exporter may meet in a network
            row.refused = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return
        row.refused = _refusal(row, config)
        if row.refused is None:
            computes[backend] = compute

    if like is not None:
        if like.backend != REFERENCE:
            try_out(like.backend)
        if like.backend in computes:
            rates = {row.backend: row.images_per_s for row in like.measured}
            measured = [row.model_copy(update={"images_per_s": rates.get(row.backend, {})}) for row in rows.values()]
            return BackendChoice(backend=like.backend, measured=measured)
    for backend in _tried(config):
        if backend not in rows:
            try_out(backend)
    wanted = config.backend
    if wanted != "auto" and wanted not in computes:
        raise ServingError(f"serve.backend {wanted}: {rows[wanted].refused}; set serve.backend: auto")
    sizes = sorted({1, min(8, config.max_batch_size), config.max_batch_size})
    _measure(computes, rows, sizes, preprocessing.image_size)
    best = max(computes, key=lambda backend: _speed(rows[backend].images_per_s)) if wanted == "auto" else wanted
    return BackendChoice(backend=best, measured=list(rows.values()))


def choose_for_package(uri: str, config: ServingConfig, num_replicas: int, like: BackendChoice | None = None) -> BackendChoice:
    """Load and verify the package at `uri`, and `choose` as `config` says, with a replica's share of this machine's cores.

    Args:
        like: as of `choose`.

    Raises:
        RegistryError: no package there, it does not verify, or nobody trusted has signed it.
        ServingError: as `choose` does.
    """
    from eagleray.artifacts.package import load_examples, load_package

    card, model = load_package(uri, config.trusted_keys)
    num_threads = threads_for(model, card.preprocessing, share_of_cores(num_replicas))
    return choose(config, model, card.preprocessing, num_threads, load_examples(uri, card), like)


def share_of_cores(num_replicas: int) -> int:
    """Return the threads of a replica's model where so many replicas share this machine's cores."""
    return min(MAX_THREADS, max(1, len(os.sched_getaffinity(0)) // num_replicas))


def threads_for(model: nn.Module, preprocessing: Preprocessing, most: int) -> int:
    """Return the threads that the network is worth, `most` or 1, and set PyTorch's to as many."""
    import torch

    torch.set_num_threads(1 if is_small(model, preprocessing) else most)
    return torch.get_num_threads()


def is_small(model: nn.Module, preprocessing: Preprocessing) -> bool:
    """Return whether a picture takes less than `SMALL_S` on one core; PyTorch has one thread afterwards."""
    import torch

    torch.set_num_threads(1)
    compute = build(REFERENCE, model, preprocessing, 1)
    picture = np.zeros((1, preprocessing.image_size, preprocessing.image_size, 3), np.uint8)
    times = []
    for _ in range(3):  # the first one allocates
        start = time.perf_counter()
        compute(picture)
        times.append(time.perf_counter() - start)
    return min(times) < SMALL_S


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


def _tried(config: ServingConfig) -> list[BackendName]:
    if config.backend != "auto":
        return [config.backend] if config.backend != REFERENCE else []
    return [backend for backend in BACKENDS if backend != REFERENCE and (backend != INT8 or config.int8_agreement is not None)]


def _refusal(row: Measured, config: ServingConfig) -> str | None:
    """Return why a back end with these figures is not taken; differences that are no number are too large as well."""
    assert row.drift is not None and row.agreement is not None
    if row.backend != INT8:
        if row.drift <= config.backend_tolerance:
            return None
        return f"its probabilities differ by up to {row.drift:.3g}, more than serve.backend_tolerance {config.backend_tolerance:g}"
    assert config.int8_agreement is not None
    if row.drift <= 1 and row.agreement >= config.int8_agreement:
        return None
    return f"{row.agreement:.1%} of the pictures keep their class, fewer than serve.int8_agreement {config.int8_agreement:g}"


def _calibrates(examples: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    count = 0 if examples is None else int(len(examples) * CALIBRATION_SHARE)
    if examples is None or not count:
        raise ServingError("the package holds no pictures to calibrate it by; register the model again with data.examples above 2")
    return examples[:count]


def _compares(examples: NDArray[np.uint8], config: ServingConfig) -> NDArray[np.uint8]:
    others = examples[int(len(examples) * CALIBRATION_SHARE) :]
    return others if INT8 in _tried(config) else others[:NUM_PICTURES]


def _in_parts(compute: Compute, pictures: NDArray[np.uint8], limit_s: float = math.inf) -> tuple[NDArray[np.float32], float]:
    """Return the probabilities of the pictures, and the least seconds that one of them took in a part.

    It breaks off, with less than all of them, where two parts in a row took more than `limit_s` for a picture. The first
    part, which allocates, may take its time.
    """
    found: list[NDArray[np.float32]] = []
    times: list[float] = []
    for part in (pictures[start : start + PART] for start in range(0, len(pictures), PART)):
        begun = time.perf_counter()
        found.append(compute(part))
        times.append((time.perf_counter() - begun) / len(part))
        if min(times[1:][-2:], default=0.0) > limit_s and len(times) > 2:
            break
    return np.concatenate(found), min(times)


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


def _exported(model: nn.Module, preprocessing: Preprocessing) -> Any:
    """Return the network from pixels to probabilities as OpenVINO's graph, so that all of it is compiled."""
    _keep_to_ourselves()
    import openvino
    import torch

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.network(normalize(images, preprocessing)).float(), dim=1)

    size = preprocessing.image_size
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that are fixed; wrong answers would be noticed
        return openvino.convert_model(Whole().eval(), example_input=example, input=[-1, size, size, 3])


def _quantized(graph: Any, pictures: NDArray[np.uint8]) -> Any:
    """Return the graph with convolutions and matrix products in int8, ranges being those that `pictures` call forth.

    By NNCF's post-training quantisation; attention is treated as its own kind of network.
    """
    import nncf

    nncf.set_log_level(logging.ERROR)
    has_attention = any(node.get_type_name() == "ScaledDotProductAttention" for node in graph.get_ops())
    with contextlib.redirect_stdout(io.StringIO()):  # its bars of progress
        return nncf.quantize(
            graph,
            nncf.Dataset([picture[None] for picture in pictures]),
            subset_size=len(pictures),
            model_type=nncf.ModelType.TRANSFORMER if has_attention else None,
        )


def _openvino(graph: Any, num_threads: int, *, is_bf16: bool) -> Compute:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if is_bf16 else "f32",
        "INFERENCE_NUM_THREADS": num_threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # all replicas of a machine would take the same cores
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()

    def compute(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = np.array(request.infer([images])[0], dtype=np.float32)
        return result

    return compute


def _keep_to_ourselves() -> None:
    """Make OpenVINO and NNCF do without their telemetry, which tells Google Analytics of each use unless a person has declined."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing it fails then, which both allow for
