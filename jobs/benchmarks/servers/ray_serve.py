"""Ray Serve as its documentation shows it: one deployment with `@serve.batch`."""

from __future__ import annotations

from typing import Any

import ray
from jobs.benchmarks.servers.common import BATCH_WAIT_S, MAX_BATCH_SIZE, Classifier, ServeTask, task
from ray import serve
from starlette.requests import Request


@serve.deployment(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=2 * MAX_BATCH_SIZE)
class Batched:
    def __init__(self, to_do: ServeTask) -> None:
        self.classifier = Classifier(to_do)

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_S)
    async def classify(self, pictures: list[bytes]) -> list[dict[str, Any]]:
        return self.classifier.classify([self.classifier.decode(data) for data in pictures])

    async def __call__(self, request: Request) -> dict[str, Any]:
        answer: dict[str, Any] = await self.classify(await request.body())
        return answer


if __name__ == "__main__":
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": task().port})
    serve.run(Batched.bind(task()), route_prefix="/predict", blocking=True)
