"""What is shown again and again."""

from __future__ import annotations

import pytest

from eagleray import cli


def test_it_is_drawn_anew_until_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    drawn: list[str] = []

    def draw() -> str:
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(f"{len(drawn) + 1} jobs")
        return drawn[-1]

    monkeypatch.setattr(cli, "WATCH_S", 0.0)
    cli._show(draw, watch=True)
    assert drawn == ["1 jobs", "2 jobs", "3 jobs"] and capsys.readouterr().out.strip() == "3 jobs"


def test_it_is_drawn_once_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    cli._show(lambda: "2 jobs", watch=False)
    assert capsys.readouterr().out == "2 jobs\n"
