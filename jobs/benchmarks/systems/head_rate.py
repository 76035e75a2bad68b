"""How many tasks per second Ray starts and ends here: with empty ones, from one driver, on all cores."""

from __future__ import annotations

import time

from jobs.benchmarks.systems.protocol import answer

from eagleray.cluster.connect import connected

TASKS = 1_000


def main() -> None:
    with connected():
        import ray  # reads the environment that a connection prepares

        task = ray.remote(_nothing)
        ray.get([task.remote() for _ in range(100)])  # starts the worker processes
        start = time.perf_counter()
        ray.get([task.remote() for _ in range(TASKS)])
        answer({"tasks_per_s": TASKS / (time.perf_counter() - start)})


def _nothing() -> None:
    return None


if __name__ == "__main__":
    main()
