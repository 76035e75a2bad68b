"""Every job file that users copy gives a network, an optimizer and a schedule that reach its peak learning rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eagleray.config.load import load_job
from eagleray.models.zoo import build_model
from eagleray.training.finetune import find_head
from eagleray.training.recipe import build_optimizer, build_schedule, learning_rate, peak_learning_rate

JOBS = sorted((Path(__file__).resolve().parents[3] / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_file_can_be_trained(path: Path) -> None:
    job = load_job(path)
    with torch.device("meta"):
        model = build_model(job.model, 10, job.data.image_size).eval()
        for size in {job.data.image_size} | ({job.data.train_size.start, job.data.train_size.end} if job.data.train_size else set()):
            assert model(torch.empty(2, 3, size, size)).shape == (2, 10)
    optimizer = build_optimizer(model, job.train, find_head(job, num_classes=10))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    schedule = build_schedule(optimizer, job.train.schedule, job.train.epochs, steps_per_epoch=50)
    rates = [learning_rate(schedule, step) for step in range(50 * job.train.epochs)]
    assert max(rates) == pytest.approx(peak_learning_rate(job.train), rel=0.01)
    assert 0 < rates[-1] < rates[len(rates) // 2] < max(rates)


def test_there_is_one_for_each_recipe_in_the_documentation() -> None:
    table = (JOBS[0].parents[1] / "docs" / "training.md").read_text()
    for path in JOBS:
        assert path.stem == "quickstart" or f"jobs/{path.name}" in table
