"""What tests of the endpoint share: packages of small models, requests, load, and the replicas' processes."""

from __future__ import annotations

import io
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from eagleray.artifacts.package import ModelCard, save_package
from eagleray.config.schema import ModelConfig
from eagleray.data.transforms import Preprocessing
from eagleray.models.zoo import build_model

CLASSES = [f"digit-{i}" for i in range(10)]


def picture(seed: int = 0, width: int = 30, height: int = 20) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


SMALL = ModelConfig(name="cnn", params={"width": 8})


def package(uri: str, seed: int, name: str = "digits", config: ModelConfig = SMALL, examples: NDArray[np.uint8] | None = None) -> str:
    torch.manual_seed(seed)
    card = ModelCard(
        name=name,
        model=config,
        classes=CLASSES,
        preprocessing=Preprocessing(image_size=32, eval_resize=32),
        metrics={},
        run_name="test",
        data_digest="",
        job={},
        code_version="",
    )
    save_package(uri, build_model(config, len(CLASSES), 32).state_dict(), card, examples)
    return uri


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def predict(client: httpx.Client, key: str, **headers: str) -> dict[str, Any]:
    response = client.post("/predict/digits", content=picture(), headers={"X-Routing-Key": key, **headers})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@contextmanager
def constant_load(client: httpx.Client, model: str = "digits") -> Iterator[list[tuple[int, str]]]:
    """Ask all the time from four threads; yields the growing list of (status, variant or text)."""
    results: list[tuple[int, str]] = []
    stop = threading.Event()

    def ask(thread: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                response = client.post(f"/predict/{model}", content=picture(), headers={"X-Routing-Key": f"load-{thread}-{number}"})
            except httpx.HTTPError as error:
                results.append((0, repr(error)))
                continue
            results.append((response.status_code, response.json()["variant"] if response.status_code == 200 else response.text))

    with ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(ask, thread) for thread in range(4)]
        try:
            yield results
        finally:
            stop.set()
            for thread in threads:
                thread.result()


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def replica_pids(application: str) -> list[int]:
    """Return the processes of an application's replicas, of the cluster that this test started."""
    pids = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"ServeReplica:{application}:" in command and os.getpid() in _ancestors(int(directory.name)):
            pids.append(int(directory.name))
    return pids


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        status = Path(f"/proc/{pid}/status").read_text()
        found = re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)
        pid = int(found.group(1)) if found else 0
        yield pid
