"""Why a worker failed, in a line for the user."""

from __future__ import annotations

from eagleray.training.failures import reason_of

ANY_DEATH = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits "
    "with a connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer due to high "
    "memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another unexpected error."
)
BY_THE_MEMORY_MONITOR = "1 worker(s) were killed due to the node running low on memory. Memory on the node was 23.1GB / 24.0GB."


def test_memory_is_blamed_only_where_ray_says_that_it_was_memory() -> None:
    assert "lower data.shuffle_window" in reason_of(RuntimeError(BY_THE_MEMORY_MONITOR))
    assert reason_of(RuntimeError(ANY_DEATH)) == ANY_DEATH
