"""The peers' transform: bytes of a JPEG → uint8 [3, S, S], by Pillow or by torchvision.

Run as a program it says which of the two is faster on the pictures of a folder.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import torch
from jobs.benchmarks.systems.protocol import CROP_RATIO, CROP_SCALE, IMAGE_SIZE, answer
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

DECODERS = ("pil", "torchvision")


class Transform:
    """Decode, RandomResizedCrop with antialiasing, horizontal flip; a class, so that worker processes can be given it."""

    def __init__(self, decoder: str) -> None:
        self._decode = {"pil": _decode_pil, "torchvision": _decode_torchvision}[decoder]
        changes = [v2.RandomResizedCrop(IMAGE_SIZE, CROP_SCALE, CROP_RATIO, antialias=True), v2.RandomHorizontalFlip()]
        self._change = v2.Compose(changes + ([v2.PILToTensor()] if decoder == "pil" else []))

    def __call__(self, data: bytes) -> torch.Tensor:
        return self.change(self._decode(data))

    def change(self, image: torch.Tensor | Image.Image) -> torch.Tensor:
        """Crop and flip what is decoded already."""
        return self._change(image)  # type: ignore[no-any-return]


def _decode_pil(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _decode_torchvision(data: bytes) -> torch.Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def images_per_s(decoder: str, pictures: list[bytes]) -> float:
    transform = Transform(decoder)
    start = time.perf_counter()
    for data in pictures:
        transform(data)
    return len(pictures) / (time.perf_counter() - start)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sample = [path.read_bytes() for path in sorted(Path(sys.argv[1]).rglob("*.jpg"))[:200]]
    rates = {decoder: max(images_per_s(decoder, sample) for _ in range(3)) for decoder in DECODERS}
    answer({"rates": rates, "faster": max(rates, key=lambda decoder: rates[decoder])})
