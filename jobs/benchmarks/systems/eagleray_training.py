"""One `eagleray train` as a user runs it, on a cluster of its own; answers with what each epoch reported."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from jobs.benchmarks.systems.protocol import answer

from eagleray import api
from eagleray.cluster.connect import connected
from eagleray.config.load import build_job


def main(job: dict[str, Any], num_cpus: int | None = None) -> None:
    epochs: list[dict[str, float]] = []
    with connected(num_cpus=num_cpus):
        trained = api.train(build_job(job), on_epoch=lambda metrics: epochs.append({**metrics, "reported": time.time()}))
    answer({"epochs": epochs, "metrics": trained.metrics})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), *(int(cpus) for cpus in sys.argv[2:]))
