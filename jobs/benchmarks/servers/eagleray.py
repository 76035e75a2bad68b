"""eagleray as `eagleray serve deploy` starts it: router, log of assignments and batching on, the back end chosen at deploy time."""

from __future__ import annotations

import signal
import tempfile

import torch
from jobs.benchmarks.servers.common import MAX_BATCH_SIZE, ServeTask, task
from jobs.benchmarks.systems.protocol import answer

from eagleray import api
from eagleray.artifacts.package import ModelCard, save_package
from eagleray.cluster.connect import connected
from eagleray.config.schema import ModelConfig, ServingConfig, WorkspaceConfig
from eagleray.data.transforms import Preprocessing
from eagleray.models.zoo import build_model

MODEL = "benchmark"


def model_card(config: ModelConfig, num_classes: int, image_size: int) -> ModelCard:
    return ModelCard(
        name=MODEL,
        model=config,
        classes=[str(i) for i in range(num_classes)],
        preprocessing=Preprocessing(image_size=image_size, eval_resize=image_size * 8 // 7),
        metrics={},
        run_name="benchmark",
        data_digest="",
        job={},
        code_version="",
    )


def register(workspace: WorkspaceConfig, config: ModelConfig, num_classes: int, image_size: int, seed: int = 0) -> int:
    """Register the network with weights of its own; returns the version."""
    torch.manual_seed(seed)
    uri = f"{workspace.models_uri}/{MODEL}-{seed}"
    card = model_card(config, num_classes, image_size)
    save_package(uri, build_model(config, num_classes, image_size).state_dict(), card)
    return api.open_registry(workspace).register(MODEL, uri, "", {}).version


def register_task(workspace: WorkspaceConfig, to_do: ServeTask, seed: int = 0) -> int:
    if to_do.package is not None:
        return api.open_registry(workspace).register(MODEL, to_do.package, "", {}).version
    return register(workspace, ModelConfig(name=to_do.network), to_do.num_classes, to_do.image_size, seed)


def serving_config(to_do: ServeTask) -> ServingConfig:
    options = {
        "port": to_do.port,
        "max_batch_size": MAX_BATCH_SIZE,
        "backend": to_do.backend,
        "placement": to_do.placement,
        "int8_agreement": to_do.int8_agreement,
    }
    return ServingConfig.model_validate(options)


def main() -> None:
    to_do = task()
    with tempfile.TemporaryDirectory() as root, connected():
        workspace = WorkspaceConfig(root=root)
        version = register_task(workspace, to_do)
        api.serve(workspace, {"champion": f"{MODEL}:{version}"}, serving_config(to_do))
        answer(api.serve_status(None))
        signal.pause()


if __name__ == "__main__":
    main()
