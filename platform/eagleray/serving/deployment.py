"""One model version, answering: decodes on threads, classifies in batches; and the Ray Serve deployment of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from ray import serve

from eagleray.config.schema import BackendName, ServingConfig
from eagleray.errors import DataError, ServingError
from eagleray.serving.autoscaling import BUSY, BusyTime
from eagleray.serving.backends import share_of_cores
from eagleray.serving.batching import Batcher
from eagleray.serving.metrics import ReplicaMetrics

if TYPE_CHECKING:
    from eagleray.serving.predictor import Prediction

NAME = "Classifier"


class Classified(TypedDict):
    """What a replica answers: for each picture its classes, or why one of them was refused."""

    predictions: list[list[Prediction]]
    refused: str | None


class Explained(TypedDict):
    """A heat map as a PNG over its picture or as figures, or why there is none."""

    prediction: Prediction | None
    png: bytes | None
    heat_map: list[list[float]] | None
    """[h][w], 0..1."""
    square: tuple[float, float, float] | None
    """Left, top and side of what the map covers, in pixels of the picture as displayed."""
    refused: str | None


class Classifier:
    """One version on an event loop: a replica of it, or the ingress's own copy. `config` (a dumped `ServingConfig`) can change while it serves.

    Args:
        package_uri: the model package.
        num_replicas: replicas of all variants together; they share the machine's cores.
        backend: what computes the network.
        trusted_keys: as of `load_package`.
    """

    def __init__(self, package_uri: str, num_replicas: int, backend: BackendName, trusted_keys: Sequence[str] = ()) -> None:
        from eagleray.serving.predictor import Predictor  # loads torch, which the ingress does without

        # The event loop only moves bytes. One thread runs the model, so that its OpenMP threads are made once.
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._decode_threads = ThreadPoolExecutor(share_of_cores(1), thread_name_prefix="decode")
        predictor = partial(Predictor, package_uri, share_of_cores(num_replicas), trusted_keys, backend=backend)
        self._predictor = self._model_thread.submit(predictor).result()
        self._metrics = ReplicaMetrics()
        self._in_batches = Batcher(self._run_batch, max_size=1)  # `reconfigure` says how many
        self._batches = 0
        self._pictures = 0
        self._busy = BusyTime()

    def reconfigure(self, config: dict[str, Any]) -> None:
        serving = ServingConfig.model_validate(config)
        self._predictor.max_pixels = serving.max_image_pixels
        self._in_batches.max_size = serving.max_batch_size

    async def classify(self, pictures: list[bytes], top_k: int) -> Classified:
        """Classify encoded pictures; all are refused where one cannot be decoded."""
        rows, refused = await self.classify_encoded(pictures)
        return {"predictions": [self._predictor.top(row, top_k) for row in rows], "refused": refused}

    async def classify_encoded(self, pictures: list[bytes]) -> tuple[list[NDArray[np.float32]], str | None]:
        """Classify encoded pictures; returns float32 [C] of each, or none and why one of them was refused."""
        loop = asyncio.get_running_loop()
        decoding = [loop.run_in_executor(self._decode_threads, self._predictor.decode, picture) for picture in pictures]
        images = await asyncio.gather(*decoding, return_exceptions=True)
        decoded: list[NDArray[np.uint8]] = []
        for index, image in enumerate(images):
            if isinstance(image, DataError):
                which = "" if len(images) == 1 else f"picture {index}: "
                return [], f"{which}{image}"
            if isinstance(image, BaseException):
                raise image
            decoded.append(image)
        return list(await asyncio.gather(*(self._in_batches(image) for image in decoded))), None

    async def classify_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Classify uint8 [N, H, W, 3], RGB; returns probabilities, float32 [N, C]."""
        loop = asyncio.get_running_loop()
        images = await asyncio.gather(*(loop.run_in_executor(self._decode_threads, self._predictor.fit, rgb) for rgb in pixels))
        return np.stack(await asyncio.gather(*(self._in_batches(image) for image in images)))

    async def explain(self, picture: bytes, label: str | None, as_png: bool) -> Explained:
        """Show what spoke for a class (None: the most probable) in an encoded picture."""
        from eagleray.data.decode import decode_rgb, encode_png
        from eagleray.serving.explain import overlay, seen_square

        preprocessing, loop = self._predictor.card.preprocessing, asyncio.get_running_loop()

        def decode() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
            rgb = decode_rgb(picture, self._predictor.max_pixels)
            return rgb, self._predictor.fit(rgb)

        try:
            rgb, image = await loop.run_in_executor(self._decode_threads, decode)
            prediction, heat = await loop.run_in_executor(self._model_thread, self._predictor.explain, image, label)
        except (DataError, ServingError) as error:
            return {"prediction": None, "png": None, "heat_map": None, "square": None, "refused": str(error)}
        png = await loop.run_in_executor(self._decode_threads, lambda: encode_png(overlay(rgb, heat, preprocessing))) if as_png else None
        figures = None if as_png else [[round(float(value), 4) for value in row] for row in heat]
        square = seen_square(rgb.shape[0], rgb.shape[1], preprocessing)
        return {"prediction": prediction, "png": png, "heat_map": figures, "square": square, "refused": None}

    async def _run_batch(self, images: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        self._batches += 1
        self._pictures += len(images)
        self._metrics.batch_size.observe(len(images))
        loop, start = asyncio.get_running_loop(), time.perf_counter()
        with self._busy:
            rows = list(await loop.run_in_executor(self._model_thread, self._predictor.probabilities, np.stack(images)))
        self._metrics.batch_ms.observe((time.perf_counter() - start) * 1000)
        return rows

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Ray Serve how busy the network was since it last asked; see `autoscaling.replicas_for_load`."""
        return {BUSY: self._busy.share(time.perf_counter())}

    def is_small(self) -> bool:
        """Return whether the network takes less time for a picture than it takes to hand it to another process."""
        return self._predictor.is_small

    def batch_counts(self) -> dict[str, int]:
        """Return how many batches this replica has run, and how many pictures in them."""
        return {"batches": self._batches, "pictures": self._pictures}


Replica = serve.deployment(name=NAME)(Classifier)
