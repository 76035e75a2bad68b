"""LitServe as its documentation shows it: one API of four steps, batched."""

from __future__ import annotations

from typing import Any

import litserve
import torch
from jobs.benchmarks.servers.common import BATCH_WAIT_S, MAX_BATCH_SIZE, Classifier, task


class ClassifierAPI(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.classifier = Classifier(task())

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe hands on forms to what has no annotation
        return self.classifier.decode(request["content"].file.read())

    def batch(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return inputs

    def predict(self, inputs: list[torch.Tensor]) -> list[dict[str, Any]]:
        return self.classifier.classify(inputs)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    api = ClassifierAPI(max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_WAIT_S)
    litserve.LitServer(api, accelerator="cpu").run(host="127.0.0.1", port=task().port, generate_client_file=False, log_level="warning")
