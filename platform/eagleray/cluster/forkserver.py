"""Workers of a Ray on this machine, forked from a process that has loaded the libraries.

Ray starts every worker as a new Python, which loads torch, torchvision and Ray's own libraries again: on a small machine that takes
longer than a small run's work. Here a server loads them once; what Ray starts (`fork_worker.py`) asks it for a fork, which is that
worker from then on. Ray's native part reads whose worker it is when it is loaded, so that each of Ray's jobs has a server of its
own: a fork of the first one, which loads Ray.

Only a machine without GPUs does this: CUDA does not survive a fork. The servers leave this package alone, so that a job's own copy of it
counts.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

_CLIENT = Path(__file__).with_name("fork_worker.py")
_ADDRESS = "EAGLERAY_FORKSERVER"
_HEADER_BYTES = 64
_FOR_RAY = {"RAY_prestart_worker_first_driver": "0"}
"""Workers that Ray starts before there is a job would need a server of their own, which has to load Ray, too."""

_LIBRARIES = ("pandas", "pyarrow.dataset", "pyarrow.parquet", "fastapi", "torch._dynamo", "torchvision.transforms.v2")
_RAY = ("ray.train.v2._internal.execution.controller.controller", "ray.train.torch", "ray.tune", "ray.serve._private.controller")


@contextmanager
def forked_workers() -> Iterator[None]:
    """Let the Ray that is started within the block fork its workers, for as long as the block lasts.

    Not where EAGLERAY_FORK_WORKERS=0, for a library that does not stand being forked.
    """
    if sys.platform != "linux" or Path("/dev/nvidiactl").exists() or os.environ.get("EAGLERAY_FORK_WORKERS") == "0":
        yield
        return
    with tempfile.TemporaryDirectory(prefix="eagleray-") as folder:
        path = str(Path(folder) / "fork")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(128)
            server = subprocess.Popen(
                [sys.executable, "-P", __file__, str(listener.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                env={"OMP_NUM_THREADS": "1"} | os.environ,  # as Ray sets it for a worker that has one CPU
                start_new_session=True,  # Ctrl-C is for the one who started Ray
            )
        try:
            with mock.patch.dict(os.environ, {_ADDRESS: path, **_FOR_RAY}), forked_by_the_head():
                yield
        finally:
            assert server.stdin is not None
            server.stdin.close()
            server.wait()


@contextmanager
def forked_by_the_head() -> Iterator[None]:
    """Let a node that is started within the block, by a process of a head with forked workers, go to the same server."""
    from ray._private import ray_constants

    client = str(_CLIENT) if _ADDRESS in os.environ else ray_constants.SETUP_WORKER_FILENAME
    with mock.patch.object(ray_constants, "SETUP_WORKER_FILENAME", client):
        yield


def serve(listener: socket.socket) -> None:
    """Load the libraries and hand each request to the server of its job, until standard input ends: with who started this one."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    _load(_LIBRARIES)
    of_jobs: dict[bytes, socket.socket] = {}
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        job, streams, _, _ = socket.recv_fds(connection, _HEADER_BYTES, 3)
        if not streams:  # it has been killed before it asked
            connection.close()
            continue
        if job not in of_jobs:
            of_jobs[job], other = socket.socketpair()
            if os.fork() == 0:
                for inherited in (listener, connection, *of_jobs.values()):
                    inherited.close()
                _serve_job(other, job.decode().split())
            other.close()
        with suppress(BrokenPipeError):  # whoever asked finds the connection closed, and starts the worker by itself
            socket.send_fds(of_jobs[job], [b" "], [connection.fileno(), *streams])
        connection.close()
        for stream in streams:
            os.close(stream)


def _serve_job(requests: socket.socket, job: list[str]) -> None:
    """Load Ray for a job and answer each request with a fork, until the first server ends."""
    os.environ["RAY_JOB_ID"], os.environ["RAY_RAYLET_PID"] = job
    import ray.actor

    with mock.patch.object(ray.actor, "ActorClassID", _ClassIds):
        _load(_RAY)
    while True:
        _, descriptors, _, _ = socket.recv_fds(requests, 1, 4)
        if not descriptors:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            _become_worker(socket.socket(fileno=descriptors[0]), descriptors[1:])
        for descriptor in descriptors:
            os.close(descriptor)


class _ClassIds:
    """Stands for Ray's own while its libraries declare actors.

    That one draws from a generator, whose state all forks would share from then on: their tasks would have the same ids.
    """

    @staticmethod
    def from_random() -> Any:
        from ray._raylet import ActorClassID

        return ActorClassID(os.urandom(ActorClassID.size()))


def _load(modules: tuple[str, ...]) -> None:
    for module in modules:
        with suppress(ImportError):  # then workers load it themselves, and say what is wrong
            importlib.import_module(module)
    gc.freeze()  # so that a collection in a fork leaves the shared pages alone


def _become_worker(connection: socket.socket, streams: list[int]) -> None:
    """Be what `fork_worker.py` was asked to start: its streams, folder, environment and arguments."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    request = json.loads(b"".join(iter(lambda: connection.recv(1 << 16), b"")))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    connection.send(b"k")
    connection.close()

    outdated = _python_path()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    _enter(request["context"])
    sys.argv = request["arguments"]
    sys.path[:] = [str(Path(sys.argv[0]).parent), *_python_path(), *(entry for entry in sys.path if entry not in outdated)]
    importlib.invalidate_caches()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()


def _enter(context: dict[str, Any]) -> None:
    """Set up a runtime environment: what Ray does with a shell, for a folder and variables."""
    from ray._private.utils import update_envs

    update_envs(context.get("env_vars", {}))
    if prefix := context.get("command_prefix", []):  # cd FOLDER &&
        os.chdir(shlex.split(prefix[1])[0])


def _python_path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # none of the libraries has anything to put away
