"""The image holds what the package needs, and runs as nobody in particular."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def test_the_lock_pins_every_dependency_within_its_bounds(repository: Path) -> None:
    from packaging.requirements import Requirement

    lock = (repository / "cluster" / "images" / "requirements.lock").read_text().splitlines()
    pinned = dict(re.match(r"([\w.-]+)(?:\[.*\])?==([^ ;]+)", line).groups() for line in lock if line and not line.startswith("#"))  # type: ignore[union-attr]
    wanted = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["dependencies"]
    for requirement in map(Requirement, wanted):
        assert requirement.name in pinned and pinned[requirement.name] in requirement.specifier, (
            f"{requirement}: write cluster/images/requirements.lock anew, its first line says how"
        )


def test_every_path_that_the_dockerfile_copies_is_there(repository: Path) -> None:
    text = (repository / "cluster" / "images" / "Dockerfile").read_text()
    copied = [path for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M) for path in line.split()[:-1]]
    assert copied and all((repository / path).exists() for path in copied)


def test_the_image_does_not_run_as_root(repository: Path) -> None:
    text = (repository / "cluster" / "images" / "Dockerfile").read_text()
    final = text.rsplit("\nFROM ", 1)[1]
    users = re.findall(r"^USER (.*)$", final, re.M)
    assert users == ["1000"] and final.index("USER 1000") > final.index("apt-get install")
