"""The head goes as if its plug were pulled, and a new one comes with another token."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest
from head_for_tests import Head, cluster_environment, kill, started_head
from serving_for_tests import wait_until
from shards_for_tests import digits_job, write_digit_shards

from eagleray.config.load import dump_job

pytestmark = pytest.mark.slow

EPOCHS = 12
STEPS = 15  # of an epoch, after each of which the run saves


def test_a_new_head_with_a_new_token_goes_on_with_the_run(tmp_path: Path) -> None:
    """Who still has the old token is told so. The list of jobs went with the head; runs are in the workspace."""
    job_path, history = tmp_path / "job.yaml", tmp_path / "work" / "runs" / "lost" / "history.json"
    write_digit_shards(tmp_path / "shards")
    job_path.write_text(
        dump_job(digits_job(tmp_path / "shards", tmp_path / "work", f"train.epochs={EPOCHS}", "data.test=null", "data.decode=cluster"))
    )
    head = Head(cluster_environment(), forks=True)
    submit = ("submit", str(job_path), "--address", head.jobs_address)
    with started_head(head):
        detached = head.eagleray(*submit, "--name", "lost", "--detach")
        assert detached.returncode == 0, detached.stdout + detached.stderr
        wait_until(lambda: history.exists() and len(json.loads(history.read_text())) >= 2, 300)
        kill(head.nodes[0])
        gone = head.eagleray(*submit, "--resume", "lost")
        assert gone.returncode == 2 and "nobody listens there" in gone.stderr and gone.stderr.count("\n") == 1

        old_token, head.environment["RAY_AUTH_TOKEN"] = head.environment["RAY_AUTH_TOKEN"], secrets.token_hex(32)
        head.start()
        refused = head.eagleray(*submit, "--resume", "lost", RAY_AUTH_TOKEN=old_token)
        assert refused.returncode == 2 and "the token was refused" in refused.stderr
        resumed = head.eagleray(*submit, "--resume", "lost")
        assert resumed.returncode == 0 and "going on after step" in resumed.stdout, resumed.stdout + resumed.stderr
    step = int(resumed.stdout.split("going on after step ")[1].split()[0])
    done = [int(line.split("epoch")[1].split("/")[0]) for line in resumed.stdout.splitlines() if "val top-1" in line]
    assert step >= STEPS and done == list(range(step // STEPS + 1, EPOCHS + 1))
