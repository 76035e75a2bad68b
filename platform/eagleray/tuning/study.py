"""Where Optuna keeps what a search has found: SQLite beside the run, or a database that several machines reach."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import DBAPIError

from eagleray import storage
from eagleray.config.schema import JobConfig
from eagleray.errors import SearchError

STUDY_DB = "study.db"
PATIENCE_S = 300.0
"""For so long a search waits for a database that has gone away; its trials train on until they have something to tell."""

RETRY_S = 1.0


def study_url(job: JobConfig, run_name: str) -> str:
    """Return where Optuna keeps the study of a search."""
    assert job.tune is not None
    if job.tune.storage is not None:
        return job.tune.storage
    if not storage.is_local(job.workspace.root):
        raise SearchError(
            f"tune.storage is needed where workspace.root is on S3 ('{job.workspace.root}'): "
            "give an Optuna URL, for example postgresql://user@host/optuna or sqlite:////absolute/path/study.db"
        )
    return f"sqlite:///{storage.join(job.workspace.runs_uri, run_name, STUDY_DB)}"


def open_studies(url: str, on_message: Callable[[str], None] = lambda text: None) -> RDBStorage:
    """Open a database of studies.

    Args:
        on_message: told when the database goes away, and when it is back.

    Raises:
        SearchError: the address is none, nobody answers there, or the driver for that kind of database is not installed.
    """
    try:
        return PatientStorage(url, on_message)
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        shown = sqlalchemy.make_url(url).render_as_string() if "://" in url else url  # without the password
        raise SearchError(f"tune.storage '{shown}': {_reason(error)}; see that the address is right and the database runs") from None


def close_lost_trials(study: optuna.Study) -> None:
    """Mark what Optuna still takes for running: trials that a driver began, and died before it had kept them."""
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


class PatientStorage(RDBStorage):
    """Optuna's storage, each call of which is a transaction: one that finds no database is tried again for `PATIENCE_S`."""

    def __init__(self, url: str, on_message: Callable[[str], None]) -> None:
        self._on_message = on_message
        self._is_within_call = True  # what cannot be opened at all is told at once
        super().__init__(url, engine_kwargs={"pool_pre_ping": True})
        self._is_within_call = False

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune saves it with the experiment; whoever listens here is of this process alone.
        state: dict[str, Any] = super().__getstate__()
        return state | {"_on_message": _nobody}

    def _patiently(self, call: Callable[[], Any]) -> Any:
        deadline = None
        while True:
            try:
                result = call()
            except (StorageInternalError, DBAPIError) as error:
                if not _is_away(error):
                    raise
                if deadline is not None and time.monotonic() > deadline:
                    raise SearchError(
                        f"the study's database has not answered for {PATIENCE_S:g} s ({_reason(error)}); "
                        "once it runs, go on with eagleray tune JOB.yaml --resume RUN"
                    ) from error
                if deadline is None:
                    deadline = time.monotonic() + PATIENCE_S
                    self._on_message(f"the study's database does not answer ({_reason(error)}); waiting for it")
                time.sleep(RETRY_S)
            else:
                if deadline is not None:
                    self._on_message("the study's database is back")
                return result


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: PatientStorage, *arguments: Any, **options: Any) -> Any:
        if self._is_within_call:  # a part of a transaction is not to be done again by itself
            return method(self, *arguments, **options)
        self._is_within_call = True
        try:
            return self._patiently(lambda: method(self, *arguments, **options))
        finally:
            self._is_within_call = False

    return call


for _name, _method in inspect.getmembers(RDBStorage, inspect.isfunction):
    if not _name.startswith("__") and not isinstance(inspect.getattr_static(RDBStorage, _name), staticmethod):
        setattr(PatientStorage, _name, _patient(_method))


def _is_away(error: BaseException) -> bool:
    """Tell whether an error is of the connection rather than of what was asked."""
    cause = error if isinstance(error, DBAPIError) else error.__cause__
    return isinstance(cause, DBAPIError) and (cause.connection_invalidated or isinstance(cause, sqlalchemy.exc.OperationalError))


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ is not None else error
    return str(getattr(cause, "orig", None) or cause).strip().splitlines()[0].rstrip(".")


def _nobody(text: str) -> None:
    """Tell nobody."""
