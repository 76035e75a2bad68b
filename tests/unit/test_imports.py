"""Imports go one way, cost nothing, and leave the standard library's `platform` alone."""

from __future__ import annotations

import ast
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

ALLOWED = {
    "errors": set(),
    "storage": {"errors"},
    "ports": {"errors"},
    "placement": set(),
    "config": {"errors", "storage"},
    "data": {"errors", "placement", "storage", "config"},
    "models": {"errors", "storage", "config"},
    "artifacts": {"errors", "storage", "config", "data", "models"},
    "training": {"errors", "placement", "storage", "config", "data", "models", "artifacts"},
    "tuning": {"errors", "placement", "storage", "config", "data", "models", "artifacts", "training", "serving"},
    "serving": {"errors", "placement", "storage", "config", "artifacts", "models", "data", "ports"},
    "cluster": {"errors", "placement", "storage", "config", "models", "ports"},
}


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        for module in modules:
            if module == "eagleray" and isinstance(node, ast.ImportFrom):
                names |= {alias.name for alias in node.names if not alias.name.startswith("__")}
            elif module and module.startswith("eagleray."):
                names.add(module.split(".")[1])
    return names


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_lies_before_it(room: str, repository: Path) -> None:
    package = repository / "platform" / "eagleray"
    files = [package / f"{room}.py"] if (package / f"{room}.py").exists() else sorted((package / room).glob("**/*.py"))
    assert files
    for path in files:
        wrong = imported_rooms(path) - ALLOWED[room] - {room}
        assert not wrong, f"{path} imports {sorted(wrong)}"


def test_the_standard_librarys_platform_is_not_hidden(repository: Path) -> None:
    assert not (repository / "platform" / "__init__.py").exists()
    assert platform.system() and "eagleray" not in str(platform.__file__)
    command = [sys.executable, "-c", "import platform; print(platform.system())"]
    assert subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout.strip() == platform.system()


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = "import sys, eagleray, eagleray.cli, eagleray.api; print([m for m in ('ray', 'torch', 'mlflow', 'pyarrow', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_help_answers_quickly_and_lists_every_verb() -> None:
    seconds, text = [], ""
    for _ in range(3):
        start = time.perf_counter()
        text = subprocess.run([sys.executable, "-m", "eagleray", "--help"], capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - start)
    for verb in ("quickstart", "ingest", "train", "tune", "data", "runs", "models", "serve", "ab", "submit", "jobs", "doctor"):
        assert f" {verb} " in text
    assert min(seconds) < 2.0  # 0.5 s on a quiet machine; a heavy import costs several
