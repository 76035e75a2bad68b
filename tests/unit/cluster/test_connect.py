"""What is set before Ray starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PREPARE = "from eagleray.cluster.connect import prepare_environment; prepare_environment()"
_MODE = "from ray._raylet import AuthenticationMode, get_authentication_mode; print(get_authentication_mode() == AuthenticationMode.TOKEN)"


@pytest.mark.parametrize("order", [f"{_PREPARE}; import ray", f"import ray; {_PREPARE}"], ids=["ray after", "ray before"])
def test_a_users_token_is_used_whenever_ray_was_imported(order: str, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a-token")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")} | {"HOME": str(tmp_path)}

    found = subprocess.run(
        [sys.executable, "-c", f"{order}; {_MODE}"], env=environment, capture_output=True, text=True, timeout=120, check=True
    )

    assert found.stdout.split()[-1] == "True"
