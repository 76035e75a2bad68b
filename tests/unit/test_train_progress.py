"""Lines on a training run in a log: they say where it stands, at a bounded rate."""

from __future__ import annotations

import time

import pytest

from eagleray.cli import _TrainProgress
from eagleray.training.board import Progress

PROGRESS = Progress(
    epoch=2,
    epochs=90,
    step=40,
    steps_per_epoch=1251,
    images_per_s=2512.3,
    loss=4.5678,
    top1=0.1234,
    data_wait_fraction=0.07,
    rollbacks=0,
    eta_s=43_200,
)


def test_a_log_gets_a_line_every_so_often(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_TrainProgress, "EVERY_S", 0.2)
    start = time.monotonic()
    with _TrainProgress() as progress:
        while time.monotonic() - start < 1:
            progress.update(PROGRESS)
    seconds = time.monotonic() - start
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= seconds / 0.2
    assert lines[0] == ("epoch   3/90  step 40/1251  loss 4.568  top-1  12.3 %  2,512 images/s  7 % waiting for data  12 h left")
