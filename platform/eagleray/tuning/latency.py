"""How fast a network would answer, and what an answer would cost: measured on what a replica runs, before any training."""

from __future__ import annotations

import tempfile
import time

import cv2
import numpy as np
import ray
import torch

from eagleray.artifacts.package import ModelCard, save_package
from eagleray.config.schema import JobConfig
from eagleray.data.transforms import Preprocessing
from eagleray.models.zoo import build_model
from eagleray.placement import on_group
from eagleray.serving.backends import INT8, choose_for_package, sample_pictures, share_of_cores
from eagleray.serving.predictor import Predictor

PICTURE_SIZE = (500, 375)
"""Width and height of the picture that is sent, in pixels: those of ImageNet's on average."""

NUM_REQUESTS = 200
MEASURE_S = 10.0
"""Time after which no further request is begun."""

Figures = dict[str, float]


def measure_where_it_is_served(job: JobConfig, classes: list[str]) -> Figures:
    """Measure `job.model` on a node that serves, where the cluster has such a group; else on any.

    Raises:
        ServingError: the back end of `serve.backend` cannot compute this network.
    """
    task = ray.remote(measure).options(num_cpus=0, label_selector=on_group("serve"))
    figures: Figures = ray.get(task.remote(job, classes))
    return figures


def measure(job: JobConfig, classes: list[str]) -> Figures:
    """Return the objectives that are measured, for one replica on this machine with the back end that it would choose.

    A request is a JPEG, decoded, scaled, classified and put into words, one after the other; its way through HTTP is not in it.
    The price is that of the replica's cores by `tune.prices.cpu_hour` while it computes full batches. Weights are random, so
    that nobody can say whether int8 would be right once they are trained: it is measured where it is asked for by name alone.
    """
    assert job.tune is not None
    num_threads = share_of_cores(1)
    model = build_model(job.model, len(classes), job.data.image_size).eval()
    card = ModelCard(
        name="latency",
        model=job.model,
        classes=classes,
        preprocessing=Preprocessing.of(job.data),
        metrics={},
        run_name="latency",
        data_digest="",
        job={},
        code_version="",
    )
    with tempfile.TemporaryDirectory(prefix="eagleray-latency-") as package:
        is_int8 = job.serve.backend == INT8
        save_package(package, model.state_dict(), card, sample_pictures(job.data.image_size) if is_int8 else None)
        asked = job.serve.model_copy(update={"trusted_keys": (), "int8_agreement": 0.0 if is_int8 else None})
        choice = choose_for_package(package, asked, num_replicas=1)
        predictor = Predictor(package, num_threads, backend=choice.backend)
    times = _request_times(predictor)
    rates = next(row.images_per_s for row in choice.measured if row.backend == choice.backend)
    return {
        "latency_p50_ms": 1000 * float(np.percentile(times, 50)),
        "latency_p99_ms": 1000 * float(np.percentile(times, 99)),
        "usd_per_1000": 1000 / max(rates.values()) * num_threads * job.tune.prices.cpu_hour / 3600,
    }


def _request_times(predictor: Predictor) -> list[float]:
    picture = cv2.resize(sample_pictures(predictor.card.preprocessing.image_size)[0], PICTURE_SIZE)
    jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
    predictor.predict([jpeg])
    times: list[float] = []
    deadline = time.monotonic() + MEASURE_S
    with torch.inference_mode():
        while len(times) < NUM_REQUESTS and time.monotonic() < deadline:
            start = time.perf_counter()
            predictor.predict([jpeg])
            times.append(time.perf_counter() - start)
    return times
