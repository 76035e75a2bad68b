"""Workers that are forked are what Ray would have started: each its own process, with its job's environment and code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from eagleray.cluster import fork_worker
from eagleray.cluster.connect import Connection

pytestmark = pytest.mark.slow


def worker(**options: Any) -> Any:
    """A new worker process, which tells of itself; ids of tasks and objects are drawn as its `ids` are."""
    import ray

    @ray.remote(num_cpus=0)
    class Worker:
        def about(self) -> dict[str, Any]:
            # What is loaded before this method runs; the server's libraries are, a job's own package is not.
            import random
            import threading

            import numpy as np
            from ray._raylet import UniqueID

            ids = [UniqueID.from_random().hex()]
            thread = threading.Thread(target=lambda: ids.append(UniqueID.from_random().hex()))
            thread.start()
            thread.join()
            loaded = [name for name in ("torch", "torchvision", "eagleray") if name in sys.modules]
            numbers = (random.random(), float(np.random.rand()), *ids)
            return {"pid": os.getpid(), "parent": os.getppid(), "loaded": loaded, "numbers": numbers, "environment": dict(os.environ)}

        def imported(self, module: str) -> str:
            import importlib

            return str(importlib.import_module(module).__file__)

        def folder(self) -> str:
            return os.getcwd()

        def threads(self) -> int:
            import torch

            return torch.get_num_threads()

        def die(self) -> None:
            os.kill(os.getpid(), signal.SIGSEGV)

    return Worker.options(**options).remote()


@pytest.fixture
def ray(ray_cluster: Connection) -> Any:
    import ray

    return ray


def test_workers_have_the_libraries_and_nothing_else_in_common(ray: Any) -> None:
    first, second = ray.get([worker().about.remote() for _ in range(2)])
    assert first["loaded"] == second["loaded"] == ["torch", "torchvision"]
    assert first["pid"] != second["pid"] and not set(first["numbers"]) & set(second["numbers"])
    assert ray.get(worker().threads.remote()) == 1, "as Ray sets it for a worker that was not given more"


def test_a_job_brings_variables_a_package_and_a_folder(ray: Any, tmp_path: Path) -> None:
    def archive(path: str, text: str) -> str:
        """What Ray makes of a folder when it submits it."""
        file = tmp_path / "content" / path
        file.parent.mkdir(parents=True)
        file.write_text(text)
        return "file://" + shutil.make_archive(str(tmp_path / file.stem), "zip", tmp_path / "content", path.split("/", maxsplit=1)[0])

    package, folder = archive("top/brought/__init__.py", ""), archive("folder/note.txt", "here")
    variables = {"COLOUR": "red", "PLACE": "${HOME}/x"}
    brought = worker(runtime_env={"env_vars": variables, "py_modules": [package], "working_dir": folder})
    about = ray.get(brought.about.remote())
    assert about["loaded"], "it was not forked"
    assert about["environment"]["COLOUR"] == "red" and about["environment"]["PLACE"] == os.environ["HOME"] + "/x"
    assert "brought" in ray.get(brought.imported.remote("brought"))
    assert (Path(ray.get(brought.folder.remote())) / "note.txt").read_text() == "here"
    with pytest.raises(ModuleNotFoundError):
        ray.get(worker().imported.remote("brought"))


def test_what_libraries_read_while_they_load_has_a_process_of_its_own(ray: Any) -> None:
    other = worker(runtime_env={"env_vars": {"OMP_NUM_THREADS": "2"}})
    assert ray.get(other.about.remote())["loaded"] == []
    assert ray.get(other.threads.remote()) == 2


def test_a_worker_that_crashes_is_noticed_and_harms_no_other(ray: Any) -> None:
    doomed, other = worker(), worker()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(doomed.die.remote(), timeout=30)
    assert ray.get(other.about.remote(), timeout=30)["pid"]
    assert ray.get(worker().about.remote(), timeout=30)["loaded"]


@pytest.mark.parametrize(
    "context",
    [
        {"py_executable": "/usr/bin/python3"},
        {"command_prefix": ["source", "env/bin/activate", "&&"]},
        {"override_worker_entrypoint": "/opt/worker.py"},
        {"env_vars": {"LD_PRELOAD": "libjemalloc.so"}},
    ],
)
def test_another_python_is_never_a_fork(context: dict[str, Any]) -> None:
    assert not fork_worker.can_fork(context) and fork_worker.can_fork({"env_vars": {"PYTHONPATH": "/a"}})


def test_without_a_server_a_worker_starts_as_ray_starts_it(tmp_path: Path) -> None:
    environment = os.environ | {"EAGLERAY_FORKSERVER": str(tmp_path / "nobody"), "RAY_JOB_ID": "01000000", "RAY_RAYLET_PID": "1"}
    (tmp_path / "worker.py").write_text("print('started')")
    arguments = [str(tmp_path / "worker.py"), "--language=PYTHON", f"{fork_worker.CONTEXT}{json.dumps({})}"]
    command = [sys.executable, str(fork_worker.__file__), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "started\n", result.stderr


FIRST_RUN = """
from eagleray.cluster.connect import connected

with connected(num_cpus=1):
    import ray
    print(ray.get(ray.remote(num_cpus=0)(lambda: "worked").remote(), timeout=60))
"""


def test_the_first_start_of_somebody_who_has_no_token_yet_works(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "EAGLERAY_FORKSERVER"))}
    command = [sys.executable, "-c", FIRST_RUN]
    result = subprocess.run(command, env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout == "worked\n", result.stderr
    assert (tmp_path / ".ray" / "auth_token").exists()


def test_nothing_reads_log_files_for_a_driver_that_prints_none_of_their_lines(ray_cluster: Connection) -> None:
    commands = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    assert any("gcs_server" in command for command in commands)
    assert not any("log_monitor.py" in command for command in commands)
