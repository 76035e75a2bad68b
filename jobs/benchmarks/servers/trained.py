"""A network that has learned something, as a package: what int8 does to answers cannot be told from random weights.

It learns which of the photographs a picture was cut from; all of its outputs stay, the others for nothing. Answers are
compared on pictures that neither training nor the package has seen.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import numpy as np
import torch
from jobs.benchmarks.pictures import encode_picture, photograph_of
from jobs.benchmarks.servers.eagleray import model_card
from jobs.benchmarks.systems.protocol import answer
from numpy.typing import NDArray

from eagleray.artifacts.package import load_examples, save_package
from eagleray.config.schema import ModelConfig
from eagleray.data.decode import decode_rgb
from eagleray.data.transforms import Preprocessing, eval_image, normalize
from eagleray.models.zoo import build_model
from eagleray.serving.backends import INT8, REFERENCE, build, share_of_cores

STEPS = 80
BATCH_SIZE = 16
NUM_EXAMPLES = 192
NUM_HELD_OUT = 512
FIRST_SEED = 1_000_000
"""Beyond those of the pictures that are sent as requests."""


@dataclass(frozen=True)
class TrainTask:
    """Train a network of the zoo and write its package to `target`."""

    network: str
    image_size: int
    num_classes: int
    target: str


def pictures(seeds: range, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    return np.stack([eval_image(decode_rgb(encode_picture(seed)), preprocessing) for seed in seeds])


def main() -> None:
    to_do = TrainTask(**json.loads(sys.argv[1]))
    torch.manual_seed(0)
    torch.set_num_threads(share_of_cores(1))
    config = ModelConfig(name=to_do.network)
    card = model_card(config, to_do.num_classes, to_do.image_size)
    model = build_model(config, to_do.num_classes, to_do.image_size)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS)
    after = FIRST_SEED + STEPS * BATCH_SIZE
    for first in range(FIRST_SEED, after, BATCH_SIZE):
        batch = range(first, first + BATCH_SIZE)
        inputs = normalize(torch.from_numpy(pictures(batch, card.preprocessing)), card.preprocessing)
        loss = torch.nn.functional.cross_entropy(model(inputs), torch.tensor([photograph_of(seed) for seed in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    held_out = range(after + NUM_EXAMPLES, after + NUM_EXAMPLES + NUM_HELD_OUT)
    card = save_package(to_do.target, model.state_dict(), card, pictures(range(after, after + NUM_EXAMPLES), card.preprocessing))
    answer(compare(model.eval(), card.preprocessing, load_examples(to_do.target, card), held_out))


def compare(model: torch.nn.Module, preprocessing: Preprocessing, examples: NDArray[np.uint8] | None, held_out: range) -> dict[str, float]:
    """Return top-1 of the reference and of int8 on held-out pictures, and the share of them whose class is the same."""
    images, labels = pictures(held_out, preprocessing), np.array([photograph_of(seed) for seed in held_out])
    parts = np.array_split(images, len(images) // BATCH_SIZE)
    found = {}
    for backend in (REFERENCE, INT8):
        compute = build(backend, model, preprocessing, share_of_cores(1), examples)
        found[backend] = np.concatenate([compute(part) for part in parts]).argmax(axis=1)
    return {
        "top1_fp32": float((found[REFERENCE] == labels).mean()),
        "top1_int8": float((found[INT8] == labels).mean()),
        "same_class": float((found[REFERENCE] == found[INT8]).mean()),
        "pictures": len(labels),
    }


if __name__ == "__main__":
    main()
