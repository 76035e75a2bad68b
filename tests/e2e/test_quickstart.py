"""The README's first command, as a person uses it: to the live endpoint, from a second terminal, and out with Ctrl-C."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from integration.terminal_for_tests import run_commands

from eagleray.ports import free_ports

pytestmark = pytest.mark.slow

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
DEADLINE_S = 600


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path, Path]]:
    """The quickstart on S3, serving; with its folder and what it printed."""
    root = tmp_path_factory.mktemp("quickstart")
    log = root / "output.txt"
    command = [sys.executable, "-m", "eagleray", "quickstart", "--s3", "--dir", str(root / "run"), "--port", str(free_ports(1)[0])]
    command += ["--json", str(root / "summary.json")]
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, cwd=root)
    deadline = time.monotonic() + DEADLINE_S
    while "Serving until Ctrl-C" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    yield process, root / "run", log
    if process.poll() is None:
        process.kill()


def eagleray(run: Path, *commands: str) -> list[str]:
    """Run commands as in a second terminal, with the settings that the quickstart left for it; return what each printed."""
    settings = dict(line.split("=", 1) for line in (run / "session.env").read_text().splitlines())
    return run_commands([shlex.split(command) for command in commands], ENVIRONMENT | settings)


def test_it_ends_with_a_table_a_picture_and_a_line_that_works(quickstart: tuple[subprocess.Popen[str], Path, Path]) -> None:
    _, run, log = quickstart
    text = log.read_text()
    assert "Traceback" not in text and "WARNING" not in text
    line = next(line for line in text.splitlines() if line.startswith("try it"))
    answer = subprocess.run(shlex.split(line.removeprefix("try it")), capture_output=True, text=True, timeout=30, check=True)
    assert '"predictions"' in answer.stdout and '"digits"' in answer.stdout
    (links,) = eagleray(run, f"models verify {json.loads(answer.stdout)['request_id']} --shards")
    assert "broken" not in links and links.count("holds") >= 5 and "every shard is what the manifest says" in links
    curve = Path(next(line for line in text.splitlines() if line.startswith("learning curve")).split()[-1])
    assert curve.read_bytes().startswith(b"\x89PNG") and run in curve.parents
    assert not (run / "runs").exists(), "runs and checkpoints are on S3"


def test_it_keeps_what_the_readme_promises(quickstart: tuple[subprocess.Popen[str], Path, Path]) -> None:
    _, run, _ = quickstart
    summary = json.loads((run.parent / "summary.json").read_text())
    print(f"{summary['seconds']['total']} s, champion's held-out top-1 {summary['champion']['top1']:.3f}")  # a busy machine is no defect
    assert summary["champion"]["top1"] >= 0.97 and summary["num_trials"] >= 4


def test_the_experiment_is_looked_at_and_ended_from_a_second_terminal(quickstart: tuple[subprocess.Popen[str], Path, Path]) -> None:
    _, run, _ = quickstart
    report, models, compared, shown, promoted, served, started, status, weights, aborted, exported = eagleray(
        run,
        "ab status digits",
        "models list",
        "models compare digits@champion digits@challenger",
        "models show digits@champion",
        "ab promote digits",
        "serve status",
        "ab start digits --challenger 1 --ramp 5%@1h,50%@1d --guardrail recall:3=0.02",
        "ab status digits",
        "ab weights digits champion=70% challenger=30%",
        "ab abort digits",
        f"models export digits@champion {run / 'exported'}",
    )
    assert "running" in report and "points" in report and "challenger − champion" in report
    assert "champion" in models and "model.name" in compared and "weights sha256" in shown
    assert "digits:2 is now digits@champion" in promoted and "100 %" in served
    assert "champion digits:2 95 %, challenger digits:1 5 %" in started and "recall of 3 (0.02)" in started
    assert "guardrail kept: challenger, recall of 3" in status
    assert "challenger digits:1 30 %" in weights
    assert "digits:2 gets all traffic" in aborted
    assert "exported to" in exported and (run / "exported" / "weights.safetensors").exists()


def test_ctrl_c_ends_it_and_leaves_no_process_behind(quickstart: tuple[subprocess.Popen[str], Path, Path]) -> None:
    process, _, log = quickstart
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0, log.read_text()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not [child.name() for child in alive]
