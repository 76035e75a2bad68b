"""The model alone, without decoding, batching or HTTP: pictures per second of what eagleray chooses, and of eager PyTorch."""

from __future__ import annotations

import torch
from jobs.benchmarks.servers.common import MAX_BATCH_SIZE, task
from jobs.benchmarks.systems.protocol import answer

from eagleray.config.schema import ModelConfig
from eagleray.data.transforms import Preprocessing
from eagleray.models.zoo import build_model
from eagleray.serving.backends import REFERENCE, choose, share_of_cores


def main() -> None:
    to_do = task()
    torch.manual_seed(0)
    torch.set_num_threads(share_of_cores(1))
    model = build_model(ModelConfig(name=to_do.network), to_do.num_classes, to_do.image_size).eval()
    preprocessing = Preprocessing(image_size=to_do.image_size, eval_resize=to_do.image_size * 8 // 7)
    choice = choose("auto", model, preprocessing, share_of_cores(1), MAX_BATCH_SIZE, tolerance=0.02)
    kept = {REFERENCE, choice.backend}
    answer({"images_per_s": {row.backend: row.images_per_s for row in choice.measured if row.backend in kept}})


if __name__ == "__main__":
    main()
