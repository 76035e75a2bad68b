"""Studies in PostgreSQL: a real server, which goes away and comes back."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from conftest import require_debian_file
from shards_for_tests import digits_job, write_digit_shards

from eagleray import api
from eagleray.cluster.connect import Connection
from eagleray.cluster.local_postgres import LocalPostgres
from eagleray.config.load import with_values
from eagleray.errors import ClusterError, SearchError
from eagleray.tuning import study
from eagleray.tuning.search import TrialResult

pytestmark = pytest.mark.slow


@pytest.fixture
def postgres() -> Iterator[LocalPostgres]:
    require_debian_file(Path("/usr/lib/postgresql"), "postgresql")
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    folder.chmod(0o755)  # where tests run as root, the server does not
    with LocalPostgres(folder) as server:
        yield server
    shutil.rmtree(folder)


def away_for(server: LocalPostgres, seconds: float) -> threading.Thread:
    """Kill the server now, and start it again after a while."""
    server.kill()

    def come_back() -> None:
        time.sleep(seconds)
        server.start()

    thread = threading.Thread(target=come_back)
    thread.start()
    return thread


def test_a_search_waits_for_its_database_and_loses_nothing(ray_cluster: Connection, postgres: LocalPostgres, tmp_path: Path) -> None:
    """It is away for 30 s in the middle of the search."""
    url = postgres.create_database("optuna")
    changes = {"num_trials": 4, "epochs": 2, "families": {"cnn": {"width": {"choice": [8]}}}, "storage": url, "max_concurrent": 1}
    job = with_values(digits_job(write_digit_shards(tmp_path / "shards"), tmp_path / "work"), {"tune": changes})
    messages: list[str] = []
    threads: list[threading.Thread] = []

    def on_trial(trial: TrialResult) -> None:
        if trial.status == "finished" and not threads:
            threads.append(away_for(postgres, 30))

    result = api.tune(job, name="patient", on_trial=on_trial, on_message=messages.append)
    threads[0].join()
    assert [trial.status != "failed" for trial in result.trials] == [True] * 4
    assert next(text for text in messages if "database" in text).startswith("the study's database does not answer (")
    assert messages[-1] == "the study's database is back"
    kept = optuna.load_study(study_name="patient", storage=url)
    assert len(kept.trials) == 4 and not kept.get_trials(states=[optuna.trial.TrialState.RUNNING])
    assert max(trial.value for trial in kept.trials if trial.value is not None) == result.best.val_top1


def test_each_call_is_done_once(postgres: LocalPostgres) -> None:
    messages: list[str] = []
    url = postgres.create_database("calls")
    kept = optuna.create_study(storage=study.open_studies(url, messages.append), study_name="s")
    trials = [kept.ask() for _ in range(2)]
    thread = away_for(postgres, 3)
    trials[0].suggest_float("x", 0, 1)
    kept.tell(trials[0], 1.0)
    thread.join()
    kept.tell(trials[1], 2.0)
    kept.ask()
    assert len(messages) == 2, messages
    rows = optuna.load_study(study_name="s", storage=url).trials
    assert [row.value for row in rows] == [1.0, 2.0, None] and "x" in rows[0].params


def test_one_that_stays_away_ends_the_search_with_the_reason(postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "PATIENCE_S", 2.0)
    kept = optuna.create_study(storage=study.open_studies(postgres.create_database("gone")))
    postgres.kill()
    start = time.monotonic()
    with pytest.raises(SearchError, match=r"the study's database has not answered for 2 s \(.*\).*--resume"):
        kept.ask()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "postgresql://me:secret@127.0.0.1:9/optuna",
            r"tune.storage 'postgresql://me:\*\*\*@127.0.0.1:9/optuna': connection failed.*refused",
        ),
        ("nosuch://host/db", r"tune.storage 'nosuch://host/db': "),
        ("study.db", r"tune.storage 'study.db': "),
        ("oracle://host/db", r"tune.storage 'oracle://host/db': .*Please install"),
    ],
)
def test_a_database_that_cannot_be_opened_is_named_without_its_password(url: str, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        study.open_studies(url)


def test_data_outlive_the_server_and_it_leaves_no_socket(postgres: LocalPostgres) -> None:
    url = postgres.create_database("kept")
    optuna.create_study(storage=url, study_name="s").add_trial(optuna.trial.create_trial(value=1.0))
    postgres.stop()
    postgres.start()
    assert postgres.create_database("kept") == url
    assert len(optuna.load_study(study_name="s", storage=url).trials) == 1


def test_without_postgresql_it_is_told_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagleray.cluster.local_postgres._FOLDERS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="PostgreSQL is not installed; run: sudo apt-get install postgresql"), LocalPostgres(tmp_path):
        pass
