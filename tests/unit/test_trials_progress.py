"""What a search shows while it goes on."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

from rich.console import Console

from eagleray.cli import TrialsProgress, search_status
from eagleray.config.schema import SearchConfig
from eagleray.tuning.search import TrialResult

SEARCH = SearchConfig.model_validate({"num_trials": 10, "epochs": 9, "families": {"cnn": {}}})


def trial(name: str, status: str, epochs: int = 3, top1: float = 0.5) -> TrialResult:
    return TrialResult(name, {"model.name": "cnn", "train.optimizer.lr": 0.01234}, status, epochs, top1, 4.0)


def shown(*trials: TrialResult, seconds: float = 60.0) -> str:
    console = Console(file=io.StringIO(), width=120, highlight=False)
    console.print(search_status(list(trials), 10, 9, seconds))
    file: Any = console.file
    return str(file.getvalue())


def test_what_runs_what_is_best_and_how_long_it_takes() -> None:
    waiting = replace(trial("b", "running", epochs=0), val_top1=float("-inf"))
    text = shown(
        trial("a", "finished", 9, 0.9), trial("s", "stopped", 1, 0.3), trial("f", "failed", 0), waiting, trial("c", "running", 2, 0.95)
    )
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert rows["b"][:3] == ["b", "cnn", "0/9"] and "inf" not in text
    assert rows["c"][:5] == ["c", "cnn", "2/9", "95.0", "%"] and "lr=0.0123" in rows["c"]
    assert "a" not in rows
    assert "3 of 10 trials ended, 1 stopped, 1 failed, best 95.0 % by cnn (c), about 2 min left" in text, text


def test_at_its_begin_nothing_is_foretold() -> None:
    waiting = replace(trial("a", "running", epochs=0), val_top1=float("-inf"))
    assert "left" not in shown(waiting) and "best" not in shown(waiting) and "0 of 10 trials ended" in shown(waiting)


def test_a_log_gets_a_line_per_trial_and_a_terminal_sees_those_that_run_as_well() -> None:
    texts = {}
    for is_terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=is_terminal, width=160, color_system=None)
        with TrialsProgress(console, SEARCH) as progress:
            progress.update(trial("a1", "running"))
            progress.update(trial("a2", "running"))
            progress.update(trial("a1", "finished"))
            progress.update(replace(trial("a2", "failed"), reason="out of [memory]"))
        file: Any = console.file
        texts[is_terminal] = str(file.getvalue())
    assert [line.split()[:4] for line in texts[False].splitlines()] == [
        ["trial", "a1", "cnn", "finished"],
        ["trial", "a2", "cnn", "failed"],
    ]
    assert "out of [memory]" in texts[False]
    assert "trial a1" in texts[True] and "2 of 10 trials ended, 1 failed" in texts[True]
