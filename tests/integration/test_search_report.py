"""The report of a search: whatever came of the trials there is a page, and a browser shows it without an error.

The picture in docs/tuning.md is made here: EAGLERAY_SCREENSHOTS=docs uv run pytest tests/integration/test_search_report.py
"""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import optuna
import pytest
from browser_for_tests import open_browser
from PIL import Image

from eagleray.artifacts.runs import JOB_NAME
from eagleray.config.load import build_job, dump_job
from eagleray.config.schema import JobConfig
from eagleray.errors import SearchError
from eagleray.tuning.report import write_report
from eagleray.tuning.search import TRIALS_NAME, TrialResult
from eagleray.tuning.study import study_url

SEARCH = {
    "families": {"cnn": {"width": {"integer": [8, 64]}}, "resnet_cifar": {"depth": {"choice": [8, 14]}}},
    "space": {"train.optimizer.lr": {"log_uniform": [0.001, 0.1]}},
    "epochs": 5,
}


def kept_search(root: Path, statuses: list[str]) -> JobConfig:
    """A run's folder as a search leaves it, of trials with these ends."""
    job = build_job({"name": "digits", "workspace": {"root": str(root)}, "data": {"train": "t", "val": "v"}, "tune": SEARCH})
    run = root / "runs" / "search"
    run.mkdir(parents=True)
    (run / JOB_NAME).write_text(dump_job(job))
    study = optuna.create_study(study_name="search", storage=study_url(job, "search"), direction="maximize")
    rng, rows = np.random.default_rng(0), []
    for number, status in enumerate(statuses):
        trial = study.ask()
        family = trial.suggest_categorical("model.name", list(SEARCH["families"]))
        values = {"model.name": family, "train.optimizer.lr": trial.suggest_float("train.optimizer.lr", 0.001, 0.1, log=True)}
        if family == "cnn":
            values["cnn.width"] = trial.suggest_int("cnn.width", 8, 64)
        else:
            values["resnet_cifar.depth"] = trial.suggest_categorical("resnet_cifar.depth", [8, 14])
        best = 0.95 - 0.2 * abs(math.log10(values["train.optimizer.lr"]) + 2) + 0.01 * rng.random()
        epochs = {"finished": 5, "stopped": 2, "failed": 0, "running": 1}[status]
        curve = [best * (1 - 0.5 ** (epoch + 1)) for epoch in range(epochs)]
        if status == "failed":
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif status != "running":
            study.tell(trial, curve[-1])
        reason = "gradients are not finite <script>alert(1)</script>" if status == "failed" else ""
        best = max(curve, default=-math.inf)
        rows.append(asdict(TrialResult(f"t{number}", values, status, epochs, best, 3.0 * epochs, reason, curve=curve)))
    (run / TRIALS_NAME).write_text(json.dumps(rows))
    return job


MANY = [
    "finished",
    "stopped",
    "failed",
    "stopped",
    "finished",
    "stopped",
    "running",
    "finished",
    "stopped",
    "stopped",
    "finished",
    "failed",
]


def test_a_browser_shows_it_without_an_error(tmp_path: Path) -> None:
    job = kept_search(tmp_path, MANY)
    report = write_report(job.workspace.runs_uri, "search", tmp_path / "report")
    with open_browser(tmp_path / "browser") as browser:
        page, problems = browser.new_page(), []
        page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request", lambda request: problems.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None
        )
        page.goto(report.as_uri())
        page.wait_for_selector(".js-plotly-plot .main-svg")
        assert page.locator(".js-plotly-plot").count() == 5
        assert page.locator("tbody tr").count() == len(MANY)
        assert (
            page.locator("tbody tr").first.locator("td").first.inner_text()
            == max(json.loads((tmp_path / "runs" / "search" / TRIALS_NAME).read_text()), key=lambda row: row["val_top1"])["trial_id"]
        )
        assert "<script>alert(1)" in page.locator("tbody").inner_text()
        folder = Path(os.environ.get("EAGLERAY_SCREENSHOTS", tmp_path))
        page.set_viewport_size({"width": 1000, "height": 1300})
        page.wait_for_timeout(500)  # the figures follow the width
        Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB").quantize(256).save(
            folder / "search_report.png", optimize=True
        )
        assert not problems
    pngs = {path.stem for path in report.parent.glob("*.png")}
    assert pngs == {"history", "importances", "parallel_coordinates", "learning_curves"}


@pytest.mark.parametrize("statuses", [["finished"], ["failed", "failed"], ["running"], ["stopped", "failed"]])
def test_there_is_a_page_whatever_came_of_the_trials(statuses: list[str], tmp_path: Path) -> None:
    job = kept_search(tmp_path, statuses)
    text = write_report(job.workspace.runs_uri, "search", tmp_path / "report").read_text()
    assert all(f"<td>t{number}</td>" in text for number in range(len(statuses)))
    assert "<script>alert(1)" not in text


def test_a_run_that_is_no_search_is_refused(tmp_path: Path) -> None:
    job = kept_search(tmp_path, ["finished"])
    (tmp_path / "runs" / "search" / TRIALS_NAME).unlink()
    with pytest.raises(SearchError, match=r"no trials there .* give the name that `eagleray tune` printed"):
        write_report(job.workspace.runs_uri, "search", tmp_path / "report")
