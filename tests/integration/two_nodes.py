"""A script: an elastic run on a cluster of two nodes, of which the second dies within an epoch, comes back, and goes after a spot notice.

Arguments: the job file, the file for the outcome (JSON), a file that makes steps slow until the new node has been taken in, and the
step after which the node dies.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from spot_for_tests import metadata_service

from eagleray import api
from eagleray.cluster.connect import connected, prepare_environment
from eagleray.cluster.forkserver import forked_workers
from eagleray.training import trainer
from eagleray.training.board import Progress

NOTICE_S = 30.0
"""AWS gives 120 s, Google Cloud 30 s."""


def watch_for_notices(cluster: Cluster, node: Any, url: str) -> subprocess.Popen[str]:
    """Do on a node what the rendered files do on each: ask the cloud's metadata service until it gives notice."""
    (node_id,) = (known["NodeID"] for known in ray.nodes() if known["RayletSocketName"] == node.raylet_socket_name)
    options = ["--address", cluster.address, "--cloud", "aws", "--node-id", node_id, "--metadata-url", url]
    return subprocess.Popen([sys.executable, "-m", "eagleray", "cluster", "watch-notices", *options], stdout=subprocess.PIPE, text=True)


def main(job_file: str, out: str, hold: str, kill_after: str) -> None:
    prepare_environment()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    job = api.load_job(job_file)
    start = time.monotonic()
    events: list[tuple[float, str]] = []
    epochs: list[dict[str, float]] = []
    progress: list[Progress] = []
    trainer.ELASTIC_CHECK_S = 5.0

    def note(text: str) -> None:
        events.append((round(time.monotonic() - start, 1), text))
        print(*events[-1], flush=True)

    def wait_until(is_so: Callable[[], bool], run: Future[Any]) -> None:
        while not is_so() and not run.done():
            time.sleep(0.1)

    def steps_done() -> int:
        return progress[-1].epoch * progress[-1].steps_per_epoch + progress[-1].step if progress else 0

    def fault(run: Future[Any]) -> None:
        wait_until(lambda: steps_done() >= int(kill_after), run)
        Path(hold).touch()
        cluster.remove_node(second, allow_graceful=False)
        note("node killed")
        wait_until(lambda: any("on 1 worker" in text for _, text in events), run)
        third = cluster.add_node(num_cpus=1)
        watcher = watch_for_notices(cluster, third, metadata.url)
        note("node added")
        wait_until(lambda: any("on 2 worker" in text for _, text in events), run)
        Path(hold).unlink()
        began = len(progress)
        wait_until(lambda: len(progress) > began, run)
        deadline = time.time() + NOTICE_S
        metadata.deadline = deadline
        note("notice given")
        said, _ = watcher.communicate(timeout=NOTICE_S)
        assert watcher.returncode == 0 and "will be taken away in" in said, said
        wait_until(lambda: time.time() > deadline, run)
        cluster.remove_node(third, allow_graceful=False)
        note(f"node taken away after step {steps_done()}")

    with connected(cluster.address), metadata_service() as metadata, ThreadPoolExecutor(1) as pool:
        run = pool.submit(api.train, job, name="elastic", on_epoch=epochs.append, on_progress=progress.append, on_message=note)
        fault(run)  # nodes are started in the main thread only
        run.result()
    Path(out).write_text(json.dumps({"events": events, "epochs": epochs}))
    cluster.shutdown()


if __name__ == "__main__":
    with forked_workers():
        main(*sys.argv[1:])
