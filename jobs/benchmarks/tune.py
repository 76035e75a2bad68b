"""Search: how near the best it comes for so much training, and what a trial takes besides training.

    uv run python -m jobs.benchmarks.tune [--quick] [--json PATH]
    uv run python -m jobs.benchmarks.tune --make-table

See docs/performance.md for what is measured, and how.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from jobs.benchmarks import harness
from jobs.benchmarks.harness import Report, console
from jobs.benchmarks.systems.protocol import rotated
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from sklearn.datasets import load_digits

from eagleray.config.load import build_job
from eagleray.config.schema import JobConfig
from eagleray.models.zoo import CNN
from eagleray.training.recipe import build_optimizer
from eagleray.tuning.proposals import Proposer
from eagleray.tuning.scheduler import build_scheduler

TABLE = Path(__file__).parent / "tables" / "digits.json.gz"
EPOCHS = 9
GRID = {
    "cnn.width": [4, 8, 16, 32],
    "train.optimizer.lr": [round(float(lr), 6) for lr in np.geomspace(1e-4, 1e-1, 8)],
    "train.global_batch_size": [16, 32, 64, 128],
    "train.optimizer.weight_decay": [0.0, 0.001, 0.01, 0.1],
}
SLOTS = 2
BUDGET = 24 * EPOCHS
"""Epochs of training that a search has, over all its trials."""


def make_table() -> None:
    """Train every point of `GRID` on scikit-learn's digits, and write the accuracy after each epoch."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order].astype(np.float32) / 8 - 1).unsqueeze(1).repeat(1, 3, 1, 1)
    targets = torch.from_numpy(digits.target[order].astype(np.int64))
    torch.set_num_threads(1)
    rows = []
    for number, point in enumerate(itertools.product(*GRID.values())):
        rows.append(_curve(dict(zip(GRID, point, strict=True)), images, targets))
        if number % 32 == 31:
            console.print(f"{number + 1} points")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_bytes(gzip.compress(json.dumps({"grid": GRID, "val_top1": rows}).encode(), mtime=0))


def _curve(values: dict[str, Any], images: torch.Tensor, targets: torch.Tensor, num_train: int = 1000) -> list[float]:
    torch.manual_seed(0)
    job = _job(values)
    model = CNN(10, width=values["cnn.width"])
    optimizer = build_optimizer(model, job.train)
    curve = []
    for _ in range(EPOCHS):
        model.train()
        for batch in torch.randperm(num_train).split(job.train.global_batch_size):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), targets[batch]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = model(images[num_train:]).argmax(1) == targets[num_train:]
        curve.append(round(float(right.float().mean()), 5))
    return curve


def _job(values: dict[str, Any] | None = None, **tune: Any) -> JobConfig:
    search = {
        "families": {"cnn": {"width": {"choice": GRID["cnn.width"]}}},
        "space": {key: {"choice": choices} for key, choices in GRID.items() if key != "cnn.width"},
        "epochs": EPOCHS,
        **tune,
    }
    document = {
        "name": "table",
        "data": {"train": "-", "val": "-", "image_size": 8, "lanes": 1},
        "train": {"optimizer": {"name": "adamw"}, "schedule": {"name": "constant", "warmup_epochs": 0}, "num_workers": 1},
        "tune": search,
    }
    settings = [f"{key}={json.dumps(value)}" for key, value in (values or {}).items() if key.startswith("train.")]
    return build_job(document, settings)


@dataclass(eq=False)
class TableTrial:
    trial_id: str
    curve: list[float]
    status: str = Trial.PENDING
    epochs: int = 0
    last_result: dict[str, Any] = field(default_factory=dict)


class TableSearch:
    """What Ray Tune does with a search, with a table in place of training: every epoch takes as long as any other."""

    def __init__(self, job: JobConfig, scheduler: TrialScheduler, table: dict[tuple[Any, ...], list[float]], seed: int) -> None:
        self.search_alg = self
        self._table = table
        self._scheduler = scheduler
        job = job.model_copy(update={"seed": seed})
        self._proposer = Proposer(job, 10, SLOTS, "table", optuna.storages.InMemoryStorage(), is_new=True)
        self._trials: list[TableTrial] = []
        self._epochs = 0
        self.best: list[float] = []
        """After each epoch of the budget, the accuracy at the last epoch of the trial that looks best by then."""

    def run(self) -> list[float]:
        while self._epochs < BUDGET:
            while len(self._running()) < SLOTS and (trial := self._next()) is not None:
                trial.status = Trial.RUNNING
            for trial in self._running():
                self._step(trial)
        return self.best[:BUDGET]

    def is_finished(self) -> bool:
        return False

    def get_trials(self) -> list[TableTrial]:
        return self._trials

    def _running(self) -> list[TableTrial]:
        return [trial for trial in self._trials if trial.status == Trial.RUNNING]

    def _next(self) -> TableTrial | None:
        if not any(trial.status == Trial.PENDING for trial in self._trials):
            name = f"t{len(self._trials)}"
            point = self._proposer.suggest(name)
            if isinstance(point, dict):
                self._trials.append(TableTrial(name, self._table[tuple(point[key] for key in GRID)]))
                self._scheduler.on_trial_add(self, self._trials[-1])
        chosen: TableTrial | None = self._scheduler.choose_trial_to_run(self)
        return chosen

    def _step(self, trial: TableTrial) -> None:
        trial.epochs += 1
        self._epochs += 1
        is_last = trial.epochs == EPOCHS
        result = {"training_iteration": trial.epochs, "val_top1": trial.curve[trial.epochs - 1], "is_last_epoch": is_last}
        trial.last_result = result
        decision = TrialScheduler.STOP if is_last else self._scheduler.on_trial_result(self, trial, result)
        if decision == TrialScheduler.STOP:
            trial.status = Trial.TERMINATED
            self._scheduler.on_trial_complete(self, trial, result)
            self._proposer.on_trial_complete(trial.trial_id, result)
        else:
            self._proposer.on_trial_result(trial.trial_id, result)
            if decision == TrialScheduler.PAUSE:
                trial.status = Trial.PAUSED
        winner = max(self._trials, key=lambda t: t.last_result.get("val_top1", 0.0))
        self.best.append(winner.curve[-1])


def _scheduler(name: str) -> TrialScheduler:
    config = _job(scheduler=None if name == "none" else {"name": name}).tune
    assert config is not None
    return build_scheduler(config, SLOTS)


def measure_quality(report: Report, seeds: int) -> None:
    """Compare regret: how far from the best of the table is what a search would hand on, for the same epochs of training."""
    kept = json.loads(gzip.decompress(TABLE.read_bytes()))
    table = dict(zip(itertools.product(*kept["grid"].values()), kept["val_top1"], strict=True))
    best = max(curve[-1] for curve in table.values())
    systems = {
        "random search": ("random", "none"),
        "random, asha": ("random", "asha"),
        "tpe": ("tpe", "none"),
        "tpe, asha": ("tpe", "asha"),
        "tpe, pausing_asha": ("tpe", "pausing_asha"),
        "tpe, hyperband": ("tpe", "hyperband"),
        "tpe, median": ("tpe", "median"),
    }
    halfway: dict[str, list[float]] = {}
    for system, (sampler, scheduler) in systems.items():
        curves = [TableSearch(_job(sampler=sampler), _scheduler(scheduler), table, seed).run() for seed in range(seeds)]
        halfway[system] = [best - curve[BUDGET // 2 - 1] for curve in curves]
        ends = [best - curve[-1] for curve in curves]
        target = best - 0.005
        reached = [next((epoch + 1 for epoch, value in enumerate(curve) if value >= target), BUDGET) for curve in curves]
        report.add(
            "quality",
            system=system,
            regret_at_half=statistics.mean(halfway[system]),
            regret=statistics.mean(ends),
            worst=max(ends),
            epochs_to_half_a_point=statistics.median(reached),
        )
        console.print(f"{system}: regret {statistics.mean(ends):.4f}")
    ours, theirs = statistics.mean(halfway["tpe, pausing_asha"]), statistics.mean(halfway["random search"])
    report.judge("regret against random search", "less", f"{ours:.4f} against {theirs:.4f} at half of the budget", ours < theirs)


@dataclass(frozen=True)
class TrialsTurn:
    """How many trials a system has in its turn; it counts as many workers per trial."""

    trials: int
    workers: int


TRIALS = {
    "eagleray": TrialsTurn(6, 1),
    "Ray Tune, function": TrialsTurn(4, 1),
    "eagleray, 2 workers": TrialsTurn(6, 2),
    "Ray Tune, TorchTrainer of 2": TrialsTurn(2, 2),
}
OVERHEAD_GOALS_S = {1: 1.0, 2: 3.0}


def measure_overhead(report: Report, rounds: int) -> None:
    """Compare what a trial takes besides its training, one trial at a time, on a cluster that is up; systems take turns."""
    took: dict[str, list[float]] = {system: [] for system in TRIALS}
    for _ in range(rounds):
        for system, turn in TRIALS.items():
            try:
                result = harness.run(sys.executable, "jobs.benchmarks.systems.trials", system, str(turn.trials), "3")
            except harness.TurnError as error:
                report.add("overhead per trial", system=system, note=str(error))
                continue
            took[system].append((result["seconds"] - sum(result["training"])) / turn.trials)
            console.print(f"{system}: {took[system][-1]:.2f} s per trial besides training")
    ours = {turn.workers: took[system] for system, turn in TRIALS.items() if system.startswith("eagleray")}
    for system, turn in TRIALS.items():
        if took[system] and ours[turn.workers]:
            middle = statistics.median(took[system])
            to_ours = middle / statistics.median(ours[turn.workers])
            report.add(
                "overhead per trial", system=system, seconds=middle, least=min(took[system]), most=max(took[system]), to_ours=to_ours
            )
    for workers, goal in OVERHEAD_GOALS_S.items():
        measured = statistics.median(ours[workers]) if ours[workers] else float("nan")
        report.judge(f"overhead per trial, {workers} worker(s)", f"under {goal:g} s", f"{measured:.2f} s", measured < goal)


SEARCHES = ("eagleray", "Optuna", "Optuna, n_jobs=2", "Ray Tune, Optuna and ASHA")
SEARCH_TRIALS, SEARCH_EPOCHS = 24, 9
TARGET = 0.975
SPEED_GOAL = 1.5


def measure_speed(report: Report, seeds: int) -> None:
    """Compare the time until a search sees a given accuracy, with the same budget of trials, on two cores; systems take turns."""
    seconds: dict[str, list[float]] = {system: [] for system in SEARCHES}
    totals: dict[str, list[float]] = {system: [] for system in SEARCHES}
    missed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        harness.run(sys.executable, "jobs.benchmarks.systems.searches", "write", folder)
        numbers = [str(number) for number in (SEARCH_TRIALS, SEARCH_EPOCHS, TARGET)]
        for seed in range(seeds):
            for system in rotated(list(SEARCHES), seed):
                try:
                    result = harness.run(sys.executable, "jobs.benchmarks.systems.searches", system, folder, str(seed), *numbers)
                except harness.TurnError as error:
                    report.add("time to accuracy", system=system, note=str(error))
                    continue
                missed[system] += result["seconds"] is None
                # One that never gets there counts with all its time, which is kind to it; eagleray misses the goal then.
                seconds[system].append(result["seconds"] or result["total"])
                totals[system].append(result["total"])
                console.print(f"{system}, seed {seed}: {seconds[system][-1]:.1f} of {result['total']:.1f} s, best {result['best']:.4f}")
    ours = statistics.mean(seconds["eagleray"] or [math.nan])
    for system in SEARCHES:
        if seconds[system]:
            report.add(
                "time to accuracy",
                system=system,
                seconds=statistics.mean(seconds[system]),
                least=min(seconds[system]),
                most=max(seconds[system]),
                to_ours=statistics.mean(seconds[system]) / ours,
                whole_search=statistics.mean(totals[system]),
                never=missed[system],
            )
    peers = {system: statistics.mean(seconds[system]) for system in SEARCHES[1:] if seconds[system]}
    best = min(peers, key=lambda system: peers[system], default="none ran")
    ratio = peers.get(best, math.nan) / ours
    is_met = ratio >= SPEED_GOAL and not missed["eagleray"]
    report.judge(f"time to {100 * TARGET:g} % against the best peer", f"{SPEED_GOAL:g} × as fast", f"{ratio:.2f} × {best}", is_met)


def main() -> None:
    parser = harness.parser("tune", __doc__, quick="five seeds instead of twenty, one round or seed of the others")
    parser.add_argument("--only", choices=["quality", "overhead", "speed"])
    parser.add_argument("--make-table", action="store_true", help="compute the table of trained configurations anew")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if arguments.make_table:
        make_table()
        return
    report = Report()
    if arguments.only in (None, "quality"):
        measure_quality(report, 5 if arguments.quick else 20)
    if arguments.only in (None, "overhead"):
        measure_overhead(report, 1 if arguments.quick else 3)
    if arguments.only in (None, "speed"):
        measure_speed(report, 1 if arguments.quick else 5)
    report.print()
    if arguments.json is not None:
        report.write(arguments.json)


if __name__ == "__main__":
    main()
