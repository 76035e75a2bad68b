"""A model version as a function from encoded pictures to probabilities; no Ray in here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from eagleray.artifacts.package import load_examples, load_package
from eagleray.config.schema import BackendName
from eagleray.data.decode import DEFAULT_MAX_PIXELS, decode_rgb
from eagleray.data.transforms import eval_image, normalize
from eagleray.serving.backends import INT8, REFERENCE, build, is_small
from eagleray.serving.explain import heat_map


class Prediction(TypedDict):
    label: str
    probability: float


class Predictor:
    """Loads the package at `package_uri` and answers for it, computing by `backend` on one core or, if it is worth it, `max_threads`.

    Raises:
        RegistryError: no package there, or its weights do not verify.
    """

    def __init__(
        self,
        package_uri: str,
        max_threads: int,
        trusted_keys: Sequence[str] = (),
        max_pixels: int = DEFAULT_MAX_PIXELS,
        backend: BackendName = REFERENCE,
    ) -> None:
        cv2.setNumThreads(1)  # pictures are decoded side by side, by the caller's threads
        self.card, model = load_package(package_uri, trusted_keys)
        self.max_pixels = max_pixels
        examples = load_examples(package_uri, self.card) if backend == INT8 else None
        self.is_small = is_small(model, self.card.preprocessing)
        num_threads = 1 if self.is_small else max_threads
        torch.set_num_threads(num_threads)
        self._compute = build(backend, model, self.card.preprocessing, num_threads, examples)
        self._model = model.to(memory_format=torch.channels_last)
        size = self.card.preprocessing.image_size
        self.probabilities(np.zeros((1, size, size, 3), np.uint8))  # the first pass allocates; no user should wait for it

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """Bring an encoded picture to the model's size: uint8 [S, S, 3]. Raises DataError with the reason."""
        return eval_image(decode_rgb(data, self.max_pixels), self.card.preprocessing)

    def fit(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Bring uint8 [H, W, 3] to the model's size: uint8 [S, S, 3]."""
        return eval_image(rgb, self.card.preprocessing)

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Classify uint8 [N, S, S, 3]; returns float32 [N, C], rows adding up to one."""
        return self._compute(images)

    def explain(self, image: NDArray[np.uint8], label: str | None) -> tuple[Prediction, NDArray[np.float32]]:
        """Return the class `label` (None: the most probable) of uint8 [S, S, 3] and the heat map of what spoke for it.

        Raises:
            ServingError: there is no heat map of this network.
        """
        probabilities = self.probabilities(image[None])[0]
        index = int(probabilities.argmax()) if label is None else self.card.classes.index(label)
        heat = heat_map(self._model, normalize(torch.from_numpy(image[None]), self.card.preprocessing), index)
        return {"label": self.card.classes[index], "probability": float(probabilities[index])}, heat

    def top(self, probabilities: NDArray[np.float32], top_k: int) -> list[Prediction]:
        """Return the `top_k` most probable classes of float32 [C], most probable first."""
        order = np.argsort(-probabilities, kind="stable")[:top_k]
        return [{"label": self.card.classes[i], "probability": float(probabilities[i])} for i in order]

    def predict(self, pictures: list[bytes], top_k: int = 5) -> list[list[Prediction]]:
        """Classify encoded pictures as one batch. Raises DataError if one of them cannot be decoded."""
        images = np.stack([self.decode(picture) for picture in pictures])
        return [self.top(row, top_k) for row in self.probabilities(images)]
