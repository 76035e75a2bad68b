"""A search of like trials, one at a time, on a cluster that is up: its time, and what of that was training.

    python -m jobs.benchmarks.systems.trials SYSTEM TRIALS EPOCHS

Ray Tune's own ways are those of its documentation, with the digits in memory; eagleray reads shards. What counts as training is
the same for all: from the first batch of each epoch to its end, validation included.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jobs.benchmarks.systems.protocol import answer

WIDTH = 8
BATCH_SIZE = 32
NUM_CPUS = 2


def main(system: str, trials: int, epochs: int) -> None:
    with tempfile.TemporaryDirectory() as folder, SYSTEMS[system](Path(folder), epochs) as search:
        search("warm-up", 1)
        start = time.perf_counter()
        training = search("search", trials)
        answer({"seconds": time.perf_counter() - start, "training": training})


@contextmanager
def eagleray(root: Path, epochs: int, num_workers: int = 1) -> Iterator[Any]:
    from eagleray import api
    from eagleray.cluster.connect import connected
    from eagleray.config.load import build_job
    from eagleray.demo import write_digits

    splits = {"val": 0.15, "test": 0.2}
    document = {
        "name": "digits",
        "workspace": {"root": str(root / "work")},
        "ingest": {"split": splits},
        "data": {"train": str(root / "shards" / "train"), "val": str(root / "shards" / "val"), "image_size": 8},
        "train": {"optimizer": {"name": "adamw"}, "global_batch_size": BATCH_SIZE},
        "tune": {
            "epochs": epochs,
            "max_concurrent": 1,
            "num_workers": num_workers,
            "scheduler": None,
            "families": {"cnn": {"width": {"choice": [WIDTH]}}},
            "space": {"train.optimizer.lr": {"log_uniform": [1e-4, 1e-2]}},
        },
    }
    job = build_job(document)

    def search(name: str, trials: int) -> list[float]:
        settings = [f"tune.num_trials={trials}"]
        return [trial.train_s for trial in api.tune(build_job(document, settings), name=name).trials]

    with connected(num_cpus=NUM_CPUS):
        api.ingest(str(write_digits(root / "pictures")), str(root / "shards"), job.ingest)
        yield search


@contextmanager
def ray_tune(root: Path, epochs: int) -> Iterator[Any]:
    """A function that trains, as in Ray Tune's guide to Optuna."""
    from ray import tune

    def objective(config: dict[str, float]) -> None:
        for metrics in train_digits(config["lr"], epochs):
            tune.report(metrics)

    with _plain_ray():
        yield lambda name, trials: _fit(tune.with_resources(objective, {"cpu": 1}), root, name, trials)


@contextmanager
def torch_trainer(root: Path, epochs: int) -> Iterator[Any]:
    """A `TorchTrainer` of two workers within each trial, as in Ray Train's guide to hyperparameter optimization."""
    from ray import tune

    def objective(config: dict[str, float]) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.tune.integration.ray_train import TuneReportCallback

        trainer = TorchTrainer(
            _loop_per_worker,
            train_loop_config={**config, "epochs": epochs},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.9}),
            run_config=RunConfig(storage_path=str(root / "runs"), callbacks=[TuneReportCallback()]),
        )
        trainer.fit()

    with _plain_ray():
        yield lambda name, trials: _fit(tune.with_resources(objective, {"cpu": 0.01}), root, name, trials)


def _loop_per_worker(config: dict[str, Any]) -> None:
    import ray.train

    for metrics in train_digits(config["lr"], config["epochs"], ray.train.get_context().get_world_rank(), 2):
        ray.train.report(metrics)


def train_digits(lr: float, epochs: int, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, float]]:
    """Train a small network on the digits; yield each epoch's accuracy and the seconds of training so far."""
    import numpy as np
    import torch
    from ray.train.torch import prepare_model
    from sklearn.datasets import load_digits

    from eagleray.models.zoo import CNN

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order].astype(np.float32) / 8 - 1).unsqueeze(1).repeat(1, 3, 1, 1)
    targets = torch.from_numpy(digits.target[order].astype(np.int64))
    num_train, num_val = 1169, 269
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = CNN(10, width=WIDTH)
    if world_size > 1:
        model = prepare_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    training = 0.0
    for _ in range(epochs):
        start = time.perf_counter()
        model.train()
        for batch in torch.randperm(num_train).split(BATCH_SIZE):
            part = batch[rank::world_size]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[part]), targets[part]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = model(images[num_train : num_train + num_val]).argmax(1) == targets[num_train : num_train + num_val]
        training += time.perf_counter() - start
        yield {"val_top1": float(right.float().mean()), "training": training}


def _fit(objective: Any, root: Path, name: str, trials: int) -> list[float]:
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    tuner = tune.Tuner(
        objective,
        param_space={"lr": tune.loguniform(1e-4, 1e-2)},
        tune_config=tune.TuneConfig(metric="val_top1", mode="max", search_alg=OptunaSearch(), num_samples=trials, max_concurrent_trials=1),
        run_config=tune.RunConfig(name=name, storage_path=str(root / "tune"), verbose=0),
    )
    return [result.metrics["training"] for result in tuner.fit() if result.metrics]


@contextmanager
def _plain_ray() -> Iterator[None]:
    import ray

    ray.init(num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


SYSTEMS: dict[str, Any] = {
    "eagleray": eagleray,
    "eagleray, 2 workers": partial(eagleray, num_workers=2),
    "Ray Tune, function": ray_tune,
    "Ray Tune, TorchTrainer of 2": torch_trainer,
}

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    os._exit(0)  # Ray has been shut down; Train's threads need not be waited for
