"""BentoML as its documentation shows it: a service with a batchable API that takes pictures."""

from __future__ import annotations

import os
import sys
from typing import Any

import bentoml
from jobs.benchmarks.servers.common import MAX_BATCH_SIZE, Classifier, task
from PIL.Image import Image


@bentoml.service(workers=1, traffic={"timeout": 60})
class Service:
    def __init__(self) -> None:
        self.classifier = Classifier(task())

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=60_000)
    def predict(self, images: list[Image]) -> list[dict[str, Any]]:
        return self.classifier.classify([self.classifier.prepare(image) for image in images])


if __name__ == "__main__":
    service = "jobs.benchmarks.servers.bento:Service"
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", service, "--host", "127.0.0.1", "--port", str(task().port)])
