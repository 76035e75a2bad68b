"""The environment of a Ray that takes requests in through HAProxy."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from eagleray.cluster.haproxy import ENABLED, haproxy_variables


def test_each_ray_has_files_and_ports_of_its_own_and_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENABLED, raising=False)
    with haproxy_variables() as one, haproxy_variables() as other:
        assert one.keys() == other.keys() and one[ENABLED] == other[ENABLED] == "1"
        alike = {name for name in one if one[name] == other[name]}
        assert alike == {ENABLED, "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"}
        program = Path(one["RAY_SERVE_HAPROXY_BINARY_PATH"])
        assert "HAProxy" in subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stdout
    assert not program.parent.exists()


@pytest.mark.parametrize("value", ["0", "1"])
def test_who_decides_himself_sees_to_all_of_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENABLED, value)
    with haproxy_variables() as variables:
        assert variables == {}


def test_without_a_program_that_ends_it_with_its_parent_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENABLED, raising=False)
    monkeypatch.setenv("PATH", "")
    with haproxy_variables() as variables:
        assert variables == {}
