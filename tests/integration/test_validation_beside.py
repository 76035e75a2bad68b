"""Validation by a process of its own comes to the metrics of the workers' own, and training does not wait for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from shards_for_tests import digits_job, write_digit_shards

from eagleray import api, storage
from eagleray.artifacts.checkpoint import load_state
from eagleray.cluster.connect import Connection
from eagleray.errors import DataError
from eagleray.training.board import Progress

pytestmark = pytest.mark.slow

SETTINGS = ("train.epochs=3", "train.ema_decay=0.8", "train.eval_flip=true", "train.deterministic=true", "data.test=null")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digit_shards(tmp_path_factory.mktemp("digits"))


def test_it_comes_to_the_same_metrics_while_training_goes_on(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    """To the last bit, of two workers, whoever decodes; and the best epoch's weights and confusions are kept as ever."""
    hold = tmp_path / "hold"
    model = f"model={{name: 'models_for_tests:slow', params: {{step_s: 0.05, eval_hold: '{hold}'}}}}"
    inline = api.train(digits_job(shards, tmp_path / "inline", *SETTINGS, model), name="run").training

    order: list[str] = []

    def on_progress(progress: Progress) -> None:
        if progress.epoch == 1 and hold.exists():
            order.append("trains on")
            hold.unlink()

    def on_message(text: str) -> None:
        if text.startswith("checked"):
            hold.touch()  # nothing is validated until the workers are seen to train on

    beside = api.train(
        digits_job(shards, tmp_path / "beside", *SETTINGS, model, "train.validation=beside", "data.decode=cluster"),
        name="run",
        on_epoch=lambda metrics: order.append(f"validated {metrics['epoch']:.0f}"),
        on_progress=on_progress,
        on_message=on_message,
    ).training
    assert order == ["trains on", "validated 0", "validated 1", "validated 2"]
    for one, other in zip(inline.history, beside.history, strict=True):
        assert set(one) == set(other)
        for name in one:
            if name.startswith(("val_", "train_")):
                assert one[name] == other[name], name
    assert inline.metrics["epoch"] == beside.metrics["epoch"]
    assert load_state(beside.checkpoint_uri)["metrics"] == beside.metrics
    confusions = [storage.read_bytes(f"{training.run_uri}/confusion.json") for training in (inline, beside)]
    assert confusions[0] == confusions[1]


def test_a_shard_that_cannot_be_read_ends_the_run_in_the_words_it_would_have_had_inline(ray_cluster: Connection, tmp_path: Path) -> None:
    shards = write_digit_shards(tmp_path / "digits")
    job = digits_job(shards, tmp_path, *SETTINGS, "train.num_workers=1", "train.validation=beside")
    (shards / "val" / "shard-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"val/shard-00000.parquet"):
        api.train(job, name="run")
