"""What a Ray on this machine starts for each worker: it asks the fork server for one, or goes on as Ray itself would.

Run by path in place of Ray's `setup_worker.py`, with that one's arguments; it loads nothing that takes time.
"""

import json
import os
import socket
import sys
from importlib.util import find_spec
from typing import Any

CONTEXT = "--serialized-runtime-env-context="
# What numeric libraries read while they load, which the server has done: these ask for a process of their own.
READ_AT_LOAD = ("OMP_", "KMP_", "MKL_", "OPENBLAS_", "LD_", "MALLOC_", "TORCH", "PYTORCH_", "PYTHONHASHSEED")


def fork(arguments: list[str]) -> bool:
    """Have the server fork this worker; return False where it cannot."""
    context = {}
    for argument in arguments:
        if argument.startswith(CONTEXT):
            context = json.loads(argument.removeprefix(CONTEXT))
    if not can_fork(context) or "RAY_JOB_ID" not in os.environ:  # Ray's client server comes this way, too
        return False
    own = [argument for argument in arguments if not argument.startswith((CONTEXT, "--language="))]
    request = {"arguments": own, "environment": dict(os.environ), "context": context, "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(os.environ["EAGLERAY_FORKSERVER"])
            job = f"{os.environ['RAY_JOB_ID']} {os.environ['RAY_RAYLET_PID']}"
            socket.send_fds(connection, [job.encode().ljust(64)], [0, 1, 2])
            connection.sendall(json.dumps(request).encode())
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(1) == b"k"
        except OSError:
            return False


def can_fork(context: dict[str, Any]) -> bool:
    """Return whether a fork of the server is what Ray would start for a runtime environment: another Python, say, is not."""
    return (
        context.get("py_executable", sys.executable) == sys.executable
        and context.get("command_prefix", [])[:1] in ([], ["cd"])
        and not context.get("override_worker_entrypoint")
        and not any(name.startswith(READ_AT_LOAD) for name in context.get("env_vars", {}))
    )


if __name__ == "__main__":
    if not fork(sys.argv[1:]):
        (ray,) = find_spec("ray").submodule_search_locations  # type: ignore[union-attr, misc]
        os.execv(sys.executable, [sys.executable, f"{ray}/_private/workers/setup_worker.py", *sys.argv[1:]])
