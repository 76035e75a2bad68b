"""The Ray Serve deployment of one model version: decodes on threads, classifies in batches."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from ray import serve

from eagleray.config.schema import ServingConfig
from eagleray.errors import DataError

if TYPE_CHECKING:
    from eagleray.serving.predictor import Prediction

NAME = "Classifier"
MAX_THREADS = 8
"""Small batches gain nothing from more."""


class Classified(TypedDict):
    """What a replica answers: for each picture its classes, or why one of them was refused."""

    predictions: list[list[Prediction]]
    refused: str | None


@serve.deployment(name=NAME)
class Classifier:
    """One version's replica. `config` (a dumped `ServingConfig`) can change while it serves.

    Args:
        package_uri: the model package.
        num_replicas: replicas of all variants together; they share the machine's cores.
    """

    def __init__(self, package_uri: str, num_replicas: int) -> None:
        from eagleray.serving.predictor import Predictor  # loads torch, which the ingress does without

        cores = len(os.sched_getaffinity(0))
        # The event loop only moves bytes. One thread runs the model, so that its OpenMP threads are made once.
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._decode_threads = ThreadPoolExecutor(min(cores, MAX_THREADS), thread_name_prefix="decode")
        num_threads = min(MAX_THREADS, max(1, cores // num_replicas))
        self._predictor = self._model_thread.submit(Predictor, package_uri, num_threads).result()
        self._batches = 0
        self._pictures = 0

    def reconfigure(self, config: dict[str, Any]) -> None:
        serving = ServingConfig.model_validate(config)
        self._predictor.max_pixels = serving.max_image_pixels
        self._run_batch.set_max_batch_size(serving.max_batch_size)  # type: ignore[attr-defined]
        self._run_batch.set_batch_wait_timeout_s(serving.batch_wait_s)  # type: ignore[attr-defined]

    async def classify(self, pictures: list[bytes], top_k: int) -> Classified:
        """Classify encoded pictures; all are refused where one cannot be decoded."""
        loop = asyncio.get_running_loop()
        decoding = [loop.run_in_executor(self._decode_threads, self._predictor.decode, picture) for picture in pictures]
        images = await asyncio.gather(*decoding, return_exceptions=True)
        for index, image in enumerate(images):
            if isinstance(image, DataError):
                which = "" if len(images) == 1 else f"picture {index}: "
                return {"predictions": [], "refused": f"{which}{image}"}
            if isinstance(image, BaseException):
                raise image
        rows = await asyncio.gather(*(self._run_batch(image) for image in images))
        return {"predictions": [self._predictor.top(row, top_k) for row in rows], "refused": None}

    async def classify_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Classify uint8 [N, H, W, 3], RGB; returns probabilities, float32 [N, C]."""
        loop = asyncio.get_running_loop()
        images = await asyncio.gather(*(loop.run_in_executor(self._decode_threads, self._predictor.fit, rgb) for rgb in pixels))
        return np.stack(await asyncio.gather(*(self._run_batch(image) for image in images)))

    @serve.batch  # type: ignore[untyped-decorator]
    async def _run_batch(self, images: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        self._batches += 1
        self._pictures += len(images)
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._model_thread, self._predictor.probabilities, np.stack(images)))

    def batch_counts(self) -> dict[str, int]:
        """Return how many batches this replica has run, and how many pictures in them."""
        return {"batches": self._batches, "pictures": self._pictures}
