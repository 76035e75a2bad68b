"""The server `eagleray`, which swaps its version and loses a replica while it is asked.

Once told how many seconds the soak lasts, it goes over to a second version after a third of them, and kills the
replica (SIGKILL) after two thirds.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time

import psutil
from jobs.benchmarks.servers.common import task
from jobs.benchmarks.servers.eagleray import MODEL, register_task, serving_config
from jobs.benchmarks.systems.protocol import answer

from eagleray import api
from eagleray.cluster.connect import connected
from eagleray.config.schema import WorkspaceConfig


def main() -> None:
    to_do = task()
    with tempfile.TemporaryDirectory() as root, connected():
        workspace = WorkspaceConfig(root=root)
        for seed in (0, 1):
            register_task(workspace, to_do, seed)
        # While the only replica starts again, all that comes has to wait.
        config = serving_config(to_do).model_copy(update={"max_queued_requests": 10_000})
        api.serve(workspace, {"champion": f"{MODEL}:1"}, config)
        seconds = float(sys.stdin.readline())
        start = time.monotonic()
        time.sleep(seconds / 3)
        api.serve(workspace, {"champion": f"{MODEL}:2"}, config)
        answer({"event": f"version 2 has taken over, {time.monotonic() - start:.0f} s"})
        time.sleep(max(0.0, 2 * seconds / 3 - (time.monotonic() - start)))
        os.kill(replica_pid(), signal.SIGKILL)
        answer({"event": f"the replica was killed, {time.monotonic() - start:.0f} s"})
        signal.pause()


def replica_pid() -> int:
    """Return the process of version 2's only replica."""
    (pid,) = (
        process.pid
        for process in psutil.Process().children(recursive=True)
        if any(f"ServeReplica:{MODEL}-v2:" in part for part in process.cmdline())
    )
    return int(pid)


if __name__ == "__main__":
    main()
