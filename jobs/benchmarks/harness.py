"""What the benchmarks share: where they ran, environments for peers, processes that are measured, and the report."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
from jobs.benchmarks.systems.protocol import MARK
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eagleray.api import code_version

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eagleray-benchmarks"
EXCLUDE_NEWER = "2026-11-20T00:00:00Z"
"""Peers are resolved as of this day, so that a later run compares the same versions."""

TURN_TIMEOUT_S = 600.0
SAMPLE_INTERVAL_S = 0.2

console = Console(width=None if sys.stdout.isatty() else 180)


class TurnError(Exception):
    """A system could not be installed or did not finish; the message is one line."""


@dataclass(frozen=True)
class Goal:
    name: str
    goal: str
    measured: str
    met: bool


@dataclass
class Report:
    """Rows for people and programs: each row is a flat dict; `section` names the table it belongs to."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, section: str, **row: Any) -> None:
        self.rows.append({"section": section, **row})

    def judge(self, name: str, goal: str, measured: str, met: bool) -> None:
        self.goals.append(Goal(name, goal, measured, met))

    def print(self) -> None:
        """Print one table per section, then the goals."""
        for section in dict.fromkeys(row["section"] for row in self.rows):
            rows = [row for row in self.rows if row["section"] == section]
            columns = [column for column in dict.fromkeys(key for row in rows for key in row) if column != "section"]
            table = Table(title=section, title_justify="left")
            for column in columns:
                is_text = column in ("system", "storage", "note")
                table.add_column(column.replace("_", " "), justify="left" if is_text else "right", overflow="fold")
            for row in rows:
                table.add_row(*(_cell(row.get(column)) for column in columns))
            console.print(table)
        if self.goals:
            table = Table("goal", "wanted", "measured", "met", title="Goals", title_justify="left")
            for goal in self.goals:
                table.add_row(goal.name, goal.goal, goal.measured, "yes" if goal.met else "[bold red]no[/]")
            console.print(table)

    def write(self, path: Path) -> None:
        document = {
            "machine": machine(),
            "versions": {"eagleray": own_versions(), **self.versions},
            "rows": self.rows,
            "goals": [asdict(goal) for goal in self.goals],
        }
        path.write_text(json.dumps(document, indent=1) + "\n")


def parser(module: str, doc: str | None, quick: str) -> argparse.ArgumentParser:
    """Return what all benchmarks can be told: `--quick`, of which `quick` says what it means, and `--json`."""
    built = argparse.ArgumentParser(prog=f"python -m jobs.benchmarks.{module}", description=doc.splitlines()[0] if doc else None)
    built.add_argument("--quick", action="store_true", help=quick)
    built.add_argument("--json", type=Path, help="also write the report to this file")
    return built


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return escape(str(value))  # errors and requirements have brackets


def machine() -> dict[str, Any]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def own_versions() -> dict[str, str]:
    packages = ("ray", "torch", "torchvision", "opencv-python-headless", "simplejpeg", "pillow", "pyarrow", "numpy")
    return {"python": platform.python_version(), "eagleray": code_version(), **{name: version(name) for name in packages}}


def version(package: str) -> str:
    """Return the version that is installed here, without the tag of a special build."""
    return importlib.metadata.version(package).partition("+")[0]


def make_environment(name: str, requirements: Sequence[str]) -> Path:
    """Return the Python of an environment with `requirements`, made with uv when first asked for.

    Raises:
        TurnError: uv is missing or finds no solution; says so.
    """
    key = "\n".join([*sorted(requirements), EXCLUDE_NEWER, platform.python_version()])
    directory = CACHE / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    python = directory / "bin" / "python"
    if (directory / "complete").exists():
        return python
    uv = shutil.which("uv")
    if uv is None:
        raise TurnError("cannot be installed: `uv` is not on the PATH")
    shutil.rmtree(directory, ignore_errors=True)
    install = [uv, "pip", "install", "--quiet", "--python", str(python), "--exclude-newer", EXCLUDE_NEWER, *requirements]
    for command in ([uv, "venv", "--quiet", "--python", sys.executable, str(directory)], install):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TurnError(f"cannot be installed: {' '.join(done.stderr.split())[:300]}")
    (directory / "complete").touch()
    return python


def installed_versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    code = "import importlib.metadata, json, sys; print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def run(
    python: Path | str,
    module: str,
    *arguments: str,
    measure_memory: bool = False,
    timeout_s: float = TURN_TIMEOUT_S,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run `module` as a process of its own and return what it answers; with `peak_memory` in bytes if asked for.

    Raises:
        TurnError: it failed or took too long; says so, with the last line it wrote.
    """
    variables = _variables(environment)
    command = [str(python), "-m", module, *arguments]
    # Files rather than pipes: what outlives the process for a moment would hold a pipe open.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        memory = MemorySampler(process.pid) if measure_memory else None
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TurnError(f"not done after {timeout_s:.0f} s") from None
        finally:
            _end_tree(process)
            peak = max(memory.stop(), default=0) if memory is not None else None
        output.seek(0)
        errors.seek(0)
        answers = _answers(output)
        lines = [line.strip() for line in errors if line.strip()]
    # The exit status tells nothing of what was measured: a stream that works ahead is broken off by the end of its process.
    if not answers:
        raise TurnError(f"failed: {lines[-1][:300] if lines else f'exit status {process.returncode}'}")
    answer = answers[-1]
    return answer if peak is None else {**answer, "peak_memory": peak}


class Running:
    """A process that goes on until it is ended, a server say."""

    def __init__(self, process: subprocess.Popen[bytes], output: IO[str], errors: IO[str]) -> None:
        self._process = process
        self._output = output
        self._errors = errors

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    def told(self) -> list[dict[str, Any]]:
        """Return all that it has answered so far."""
        self._output.seek(0)
        return _answers(self._output)

    def last_line(self) -> str:
        self._errors.seek(0)
        return next((line.strip()[:300] for line in reversed(self._errors.readlines()) if line.strip()), "it wrote nothing")


@contextmanager
def process(python: Path | str, module: str, environment: Mapping[str, str]) -> Iterator[Running]:
    """Run `module` as a process of its own until the end of the block."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = subprocess.Popen(
            [str(python), "-m", module], cwd=REPOSITORY, env=_variables(environment), stdin=subprocess.PIPE, stdout=output, stderr=errors
        )
        try:
            yield Running(started, output, errors)
        finally:
            _end_tree(started)


def _variables(more: Mapping[str, str] | None) -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "platform")])
    return {**os.environ, **_QUIET, "PYTHONPATH": path, **(more or {})}


def _answers(output: Iterable[str]) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix(MARK)) for line in output if line.startswith(MARK)]


_QUIET = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "LITDATA_DISABLE_VERSION_CHECK": "1",
    "PYTHONWARNINGS": "ignore",
}


def _end_tree(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in tree:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


class MemorySampler:
    """Samples what a process and all below it hold, in bytes, shared pages counted once, until stopped.

    Shared memory is what the processes map of it, or what /dev/shm has grown by, whichever is more: a store of
    objects may hold pages that nobody maps at the moment.
    """

    def __init__(self, pid: int, interval_s: float = SAMPLE_INTERVAL_S) -> None:
        self._process = psutil.Process(pid)
        self._interval_s = interval_s
        self._shared_before = _shared_memory_used()
        self._samples: list[int] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> list[int]:
        """Return the samples, in the order of time."""
        self._stopped.set()
        self._thread.join()
        return self._samples

    def _sample(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                tree = [self._process, *self._process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            own, mapped = (sum(sizes) for sizes in zip(*(_proportional_sizes(member.pid) for member in tree), strict=True))
            self._samples.append(own + max(mapped, _shared_memory_used() - self._shared_before))


def _proportional_sizes(pid: int) -> tuple[int, int]:
    """Return (private and file pages, shared memory) of a process in bytes, each page divided by the number who map it."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return 0, 0
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in text.splitlines()[1:])}
    return sizes["Pss_Anon"] + sizes["Pss_File"], sizes["Pss_Shmem"]


def _shared_memory_used() -> int:
    usage = os.statvfs("/dev/shm")
    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize
