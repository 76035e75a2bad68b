"""What is wrong with a set-up, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from eagleray import storage
from eagleray.cluster.connect import connected, has_token
from eagleray.errors import EagleRayError
from eagleray.ports import check_port_free

MIN_SHM_BYTES = 1_000_000_000
MIN_DISK_BYTES = 5_000_000_000
PACKAGES = ("ray", "torch", "torchvision", "mlflow", "optuna", "pyarrow", "pydantic")


@dataclass(frozen=True)
class Check:
    """One finding; `ok` None is a note rather than a verdict."""

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def diagnose(address: str | None = None, uri: str | None = None, port: int = 8000) -> list[Check]:
    """Look at Python, packages, machine, GPU, Ray and storage.

    Args:
        address: also try to join this Ray cluster.
        uri: also try to reach this folder or bucket.
        port: the endpoint's port.
    """
    return list(_checks(address, uri, port))


def _checks(address: str | None, uri: str | None, port: int) -> Iterator[Check]:
    yield _python()
    yield from (_package(name) for name in PACKAGES)
    yield _standard_library()
    yield Check("cores", None, f"{os.cpu_count()}")
    yield _space("shared memory", Path("/dev/shm"), MIN_SHM_BYTES, "Ray's object store spills to disk; in Docker, run with --shm-size=8g")
    yield _space(
        "disk for Ray", Path(os.environ.get("RAY_TMPDIR", "/tmp")), MIN_DISK_BYTES, "free some space, or set RAY_TMPDIR to a larger disk"
    )
    yield _gpu()
    yield Check("Ray token", None, "set" if has_token() else "none yet; Ray makes one when it first starts here")
    yield _attempt("endpoint's port", f"{port} is free", lambda: check_port_free("127.0.0.1", port))
    if uri is not None:
        yield _attempt("storage", f"{uri} answers", lambda: _reach(uri))
    if address is not None:
        yield _attempt("cluster", f"joined {address}", lambda: _join(address))


def _python() -> Check:
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    return Check("Python", good, platform.python_version(), "" if good else "use Python 3.11 to 3.13")


def _package(name: str) -> Check:
    try:
        return Check(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, False, "not installed", "run `uv sync`")


def _standard_library() -> Check:
    good = hasattr(platform, "system") and "eagleray" not in str(getattr(platform, "__file__", ""))
    return Check(
        "module platform",
        good,
        str(platform.__file__),
        "" if good else "remove platform/__init__.py: it hides the standard library's module",
    )


def _space(name: str, path: Path, needed: int, remedy: str) -> Check:
    if not path.exists():
        return Check(name, None, f"{path} does not exist here")
    free = shutil.disk_usage(path).free
    good = free >= needed
    return Check(name, good, f"{free / 1e9:.1f} GB free in {path}", "" if good else remedy)


def _gpu() -> Check:
    import torch

    devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if torch.cuda.is_available():
        return Check("GPU", True, ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))
    if devices:
        return Check("GPU", False, f"{devices} device(s), but torch {torch.__version__} cannot use them", "update the NVIDIA driver")
    return Check("GPU", None, "none; training runs on the CPU")


def _reach(uri: str) -> None:
    storage.check_access(uri)
    storage.exists(uri)


def _join(address: str) -> None:
    with connected(address):
        pass


def _attempt(name: str, success: str, attempt: Callable[[], None]) -> Check:
    try:
        attempt()
    except EagleRayError as error:
        finding, _, remedy = str(error).partition("; ")
        return Check(name, False, finding, remedy)
    return Check(name, True, success)
