"""What is set before Ray starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PREPARE = "from eagleray.cluster.connect import prepare_environment; prepare_environment()"
_MODE = "from ray._raylet import AuthenticationMode, get_authentication_mode; print(get_authentication_mode() == AuthenticationMode.TOKEN)"
_UV = "from ray._private import ray_constants; print(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"


@pytest.mark.parametrize("order", [f"{_PREPARE}; import ray", f"import ray; {_PREPARE}"], ids=["ray after", "ray before"])
def test_a_users_token_is_used_whenever_ray_was_imported(order: str, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a-token")
    assert _outcome(f"{order}; {_MODE}", HOME=str(tmp_path)) == "True"


@pytest.mark.parametrize(("setting", "expected"), [({}, "False"), ({"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "1"}, "True")])
def test_workers_start_without_uv_whenever_ray_was_imported_unless_the_user_says_so(setting: dict[str, str], expected: str) -> None:
    assert _outcome(f"import ray; {_PREPARE}; {_UV}", **setting) == expected


def _outcome(program: str, **settings: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | settings
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True)
    return run.stdout.split()[-1]
