"""What becomes of a run whose workers fail: it starts again, or ends with the reason.

Ray Train's controller, a process of its own, loads this and nothing that takes long.
"""

from __future__ import annotations

from typing import Any

from ray.train import Checkpoint, UserCallback
from ray.train.v2.api.exceptions import TrainingFailedError

from eagleray.errors import ConfigError, DataError, EagleRayError, StorageError, StorageFullError, TrainingError
from eagleray.training.board import Message

FINAL = (ConfigError, DataError, TrainingError, StorageFullError)
"""Errors that would only come again."""


class RunCallback(UserCallback):
    """Tells the board of checkpoints and failures; runs in Ray Train's controller, on the driver's node."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            self._board.note_checkpoint.remote()

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """End the run, by raising, where starting the workers again would only fail in the same way."""
        for exception in worker_exceptions.values():
            error = users_error(exception)
            if isinstance(error, FINAL):
                raise error
        rank, first = next(iter(worker_exceptions.items()))
        self._board.post.remote(Message(f"worker {rank} failed ({reason_of(first)}); starting again from the newest checkpoint"))


def explain(error: TrainingFailedError, run_name: str, run_uri: str) -> EagleRayError:
    """Return the first worker's own error if it was meant for the user, else one that says how to go on."""
    failures = getattr(error, "worker_failures", None) or {}
    first: BaseException = next(iter(failures.values()), error)
    go_on = f"go on from its newest checkpoint in '{run_uri}' with --resume {run_name}"
    meant = users_error(first)
    if isinstance(meant, StorageError):
        return type(meant)(f"{meant}; then {go_on}")
    return meant or TrainingError(f"run '{run_name}' failed: {reason_of(first)}; {go_on}")


def reason_of(error: BaseException) -> str:
    """Return in one line why a worker failed, and which setting to change where memory ran out."""
    text = str(error).strip()
    if "low on memory" in text:  # of every death of a process Ray says that the OOM killer may have been it
        return (
            "Ray's memory monitor killed a worker, as its node was low on memory; lower data.shuffle_window, train.global_batch_size "
            "or train.num_workers, or use nodes with more memory"
        )
    return " ".join(text.splitlines()[-1:]) or type(error).__name__


def users_error(error: BaseException | None) -> EagleRayError | None:
    """Return the error meant for the user within what Ray wrapped around it, if there is one."""
    while error is not None and not isinstance(error, EagleRayError):
        wrapped = (getattr(error, name, None) for name in ("_base_exc", "controller_failure", "cause", "__cause__"))
        error = next((inner for inner in wrapped if isinstance(inner, BaseException)), None)
    return error
