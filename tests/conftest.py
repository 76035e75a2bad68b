"""What tests share: one Ray cluster and one S3 store for the whole session, both real."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from integration.s3_proxy import S3Proxy

from eagleray.cluster.connect import Connection, connected, prepare_environment
from eagleray.cluster.local_s3 import LocalS3

prepare_environment()
# Ray's workers import models that tests define; they look where this environment says.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "integration"), os.environ.get("PYTHONPATH", "")]).rstrip(
    os.pathsep
)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once why a test failed: of a run that is broken off, the summary never comes."""
    if report.failed:
        sys.__stdout__.write(f"\n{report.nodeid} ({report.when}), {report.duration:.0f} s:\n{report.longreprtext}\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]


@dataclass(frozen=True)
class S3Store:
    """A running store, seen through a proxy that can misbehave; `bucket_uri` is a place in its bucket of the test's own."""

    server: LocalS3
    proxy: S3Proxy
    endpoint: str
    bucket_uri: str


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalS3, S3Proxy]]:
    """Put the S3 store's address and keys into the environment, before Ray starts and its workers inherit it."""
    server = LocalS3(tmp_path_factory.mktemp("s3"))
    with pytest.MonkeyPatch.context() as patch, S3Proxy(server.endpoint) as proxy:
        for name, value in {**server.environment(), "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            patch.setenv(name, value)
        yield server, proxy


@pytest.fixture(scope="session")
def _s3_bucket(s3_environment: tuple[LocalS3, S3Proxy]) -> Iterator[str]:
    # One for all tests: each bucket takes 7 of the store's 100 volumes.
    with s3_environment[0] as server:
        yield server.create_bucket("tests")


@pytest.fixture
def s3_store(_s3_bucket: str, s3_environment: tuple[LocalS3, S3Proxy]) -> S3Store:
    """The session's SeaweedFS, with a fresh place in its bucket."""
    server, proxy = s3_environment
    return S3Store(server, proxy, proxy.endpoint, f"{_s3_bucket}/{secrets.token_hex(6)}")


@pytest.fixture(scope="session")
def ray_cluster(s3_environment: tuple[LocalS3, S3Proxy]) -> Iterator[Connection]:
    """The session's Ray: two logical CPUs, as on the smallest machine."""
    with connected(num_cpus=2) as connection:
        yield connection


def require_debian(program: str, package: str) -> str:
    """Return the path of a Debian program; without it skip and say how to install it (in CI that is a failure)."""
    path = shutil.which(program)
    if path is None:
        message = f"'{program}' is not installed; run: sudo apt-get install {package}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


def require_debian_file(path: Path, package: str) -> Path:
    """Return `path`, which a Debian package brings; without it skip and say how to install it (in CI that is a failure)."""
    if not path.exists():
        message = f"'{path}' is not there; run: sudo apt-get install {package}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parent.parent
