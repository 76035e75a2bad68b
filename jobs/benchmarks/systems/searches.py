"""A search on two cores: when it first sees an accuracy, and what it comes to.

    python -m jobs.benchmarks.systems.searches write FOLDER
    python -m jobs.benchmarks.systems.searches SYSTEM FOLDER SEED TRIALS EPOCHS TARGET

All have the same pictures, network, space, sampler (TPE) and number of trials; the clock starts with the search, on a Ray that is up
and has run a trial. Optuna's own ways are those of its documentation, a function that reports each epoch and is pruned (by the
median, its default), in one thread or in two. Ray Tune's is its guide to Optuna with ASHA. Peers have the digits in memory.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jobs.benchmarks.systems.protocol import answer

NUM_CPUS = 2
BATCH_SIZE = 32
WIDTHS = [4, 32]
LEARNING_RATES = [1e-5, 1e-1]
WEIGHT_DECAYS = [1e-4, 1e-1]

Saw = Callable[[float], None]
"""Told of an accuracy as soon as the search knows of it."""


def main(system: str, folder: str, seed: int, trials: int, epochs: int, target: float) -> None:
    seen: list[tuple[float, float]] = []
    SYSTEMS[system](Path(folder), seed, trials, epochs, lambda accuracy: seen.append((time.perf_counter(), accuracy)), seen.clear)
    (start, _), *reports = seen
    reached = next((at - start for at, accuracy in reports if accuracy >= target), None)
    answer({"seconds": reached, "total": reports[-1][0] - start, "best": max(accuracy for _, accuracy in reports)})


def write(folder: Path) -> None:
    """Write the digits as shards."""
    from eagleray import api
    from eagleray.cluster.connect import connected
    from eagleray.config.schema import IngestConfig
    from eagleray.demo import write_digits

    with connected(num_cpus=NUM_CPUS):
        pictures = write_digits(folder / "pictures")
        manifests = api.ingest(str(pictures), str(folder / "shards"), IngestConfig(split={"val": 0.3}))
    answer({"pictures": {split: manifest.num_rows for split, manifest in manifests.items()}})


def eagleray(folder: Path, seed: int, trials: int, epochs: int, saw: Saw, forget: Callable[[], None]) -> None:
    from eagleray import api
    from eagleray.cluster.connect import connected
    from eagleray.config.load import build_job, with_values

    with tempfile.TemporaryDirectory() as work:
        document = {
            "name": "digits",
            "seed": seed,
            "workspace": {"root": work},
            "data": {
                "train": str(folder / "shards" / "train"),
                "val": str(folder / "shards" / "val"),
                "image_size": 8,
                "augment": {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "flip": 0.0},
            },
            "train": {
                "optimizer": {"name": "adamw"},
                "schedule": {"name": "constant", "warmup_epochs": 0},
                "label_smoothing": 0.0,
                "global_batch_size": BATCH_SIZE,
            },
            "tune": {
                "num_trials": trials,
                "epochs": epochs,
                "sampler": "tpe",
                "families": {"cnn": {"width": {"integer": WIDTHS}}},
                "space": {
                    "train.optimizer.lr": {"log_uniform": LEARNING_RATES},
                    "train.optimizer.weight_decay": {"log_uniform": WEIGHT_DECAYS},
                },
            },
        }
        job = build_job(document)
        with connected(num_cpus=NUM_CPUS):
            api.tune(with_values(job, {"tune.num_trials": 2, "tune.epochs": 1}), name="warm-up")
            forget()
            saw(0.0)
            api.tune(job, name="search", on_trial=lambda trial: saw(trial.val_top1))


def plain_optuna(folder: Path, seed: int, trials: int, epochs: int, saw: Saw, forget: Callable[[], None], n_jobs: int) -> None:
    import optuna

    data = load(folder)

    def objective(trial: optuna.Trial) -> float:
        values = {
            "width": trial.suggest_int("width", *WIDTHS),
            "lr": trial.suggest_float("lr", *LEARNING_RATES, log=True),
            "weight_decay": trial.suggest_float("weight_decay", *WEIGHT_DECAYS, log=True),
        }
        best = 0.0
        for epoch, accuracy in enumerate(train(data, values, epochs)):
            saw(accuracy)
            best = max(best, accuracy)
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return best

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    next(train(data, {"width": 8, "lr": 1e-3, "weight_decay": 1e-3}, 1))
    forget()
    saw(0.0)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=trials, n_jobs=n_jobs)


def ray_tune(folder: Path, seed: int, trials: int, epochs: int, saw: Saw, forget: Callable[[], None]) -> None:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    class Listener(tune.Callback):
        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
            saw(result["val_top1"])

    def objective(config: dict[str, Any]) -> None:
        for accuracy in train(load(folder), config, epochs):
            tune.report({"val_top1": accuracy})

    space = {
        "width": tune.randint(WIDTHS[0], WIDTHS[1] + 1),
        "lr": tune.loguniform(*LEARNING_RATES),
        "weight_decay": tune.loguniform(*WEIGHT_DECAYS),
    }

    def search(name: str, num_samples: int) -> None:
        tuner = tune.Tuner(
            tune.with_resources(objective, {"cpu": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="val_top1",
                mode="max",
                search_alg=OptunaSearch(seed=seed),
                scheduler=ASHAScheduler(max_t=epochs, grace_period=1, reduction_factor=3),
                num_samples=num_samples,
                max_concurrent_trials=NUM_CPUS,
            ),
            run_config=tune.RunConfig(name=name, storage_path=work, verbose=0, callbacks=[Listener()]),
        )
        tuner.fit()

    ray.init(num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as work:
        search("warm-up", 2)
        forget()
        saw(0.0)
        search("search", trials)
    ray.shutdown()


def load(folder: Path) -> dict[str, Any]:
    """Return the digits, float32 [N, 3, 8, 8] in -1..1, and their labels, of each split."""
    import numpy as np
    import pyarrow.dataset as ds
    import torch

    from eagleray.data.decode import decode_trusted

    data = {}
    for split in ("train", "val"):
        table = ds.dataset(sorted(str(path) for path in (folder / "shards" / split).glob("*.parquet"))).to_table()
        pixels = [decode_trusted(image) for image in table["image"].to_pylist()]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
        data[split] = (images, torch.tensor(table["label"].to_pylist()))
    return data


def train(data: dict[str, Any], values: dict[str, Any], epochs: int) -> Iterator[float]:
    """Train the network that eagleray calls `cnn`; yield each epoch's accuracy."""
    import torch

    from eagleray.models.zoo import CNN

    (images, targets), (val_images, val_targets) = data["train"], data["val"]
    torch.set_num_threads(1)
    model = CNN(10, width=values["width"])
    optimizer = torch.optim.AdamW(model.parameters(), values["lr"], weight_decay=values["weight_decay"])
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(targets)).split(BATCH_SIZE):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), targets[batch]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = model(val_images).argmax(1) == val_targets
        yield float(right.float().mean())


SYSTEMS: dict[str, Any] = {
    "eagleray": eagleray,
    "Optuna": partial(plain_optuna, n_jobs=1),
    "Optuna, n_jobs=2": partial(plain_optuna, n_jobs=2),
    "Ray Tune, Optuna and ASHA": ray_tune,
}

if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        main(sys.argv[1], sys.argv[2], *(int(number) for number in sys.argv[3:6]), float(sys.argv[6]))
    os._exit(0)  # Ray has been shut down; its threads need not be waited for
