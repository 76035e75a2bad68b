"""The model alone, without decoding, batching or HTTP: pictures per second of what eagleray chooses, and of eager PyTorch."""

from __future__ import annotations

import torch
from jobs.benchmarks.servers.common import MAX_BATCH_SIZE, task
from jobs.benchmarks.servers.eagleray import model_card
from jobs.benchmarks.systems.protocol import answer

from eagleray.config.schema import ModelConfig, ServingConfig
from eagleray.models.zoo import build_model
from eagleray.serving.backends import REFERENCE, choose, choose_for_package, share_of_cores, threads_for


def main() -> None:
    to_do = task()
    config = ServingConfig(max_batch_size=MAX_BATCH_SIZE, int8_agreement=to_do.int8_agreement)
    if to_do.package is not None:
        choice = choose_for_package(to_do.package, config, num_replicas=1)
    else:
        torch.manual_seed(0)
        network = ModelConfig(name=to_do.network)
        model = build_model(network, to_do.num_classes, to_do.image_size).eval()
        preprocessing = model_card(network, to_do.num_classes, to_do.image_size).preprocessing
        choice = choose(config, model, preprocessing, threads_for(model, preprocessing, share_of_cores(1)))
    kept = {REFERENCE, choice.backend}
    answer({"images_per_s": {row.backend: row.images_per_s for row in choice.measured if row.backend in kept}})


if __name__ == "__main__":
    main()
