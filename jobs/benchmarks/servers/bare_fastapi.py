"""FastAPI and torch with nothing between: each request is decoded and classified by itself, on a thread."""

from __future__ import annotations

from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from jobs.benchmarks.servers.common import Classifier, task


def main() -> None:
    to_do = task()
    classifier = Classifier(to_do)
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        return await run_in_threadpool(answer, await request.body())

    def answer(data: bytes) -> dict[str, Any]:
        return classifier.classify([classifier.decode(data)])[0]

    uvicorn.run(app, host="127.0.0.1", port=to_do.port, log_level="warning")


if __name__ == "__main__":
    main()
