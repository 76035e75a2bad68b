"""Training with a network that is cut up among the workers (FSDP2), by Ray Train."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import S3Store
from shards_for_tests import digits_job, write_digit_shards

from eagleray import api, storage
from eagleray.artifacts.runs import load_history
from eagleray.cluster.connect import Connection

pytestmark = pytest.mark.slow


def test_a_sharded_run_learns_like_a_copied_one_and_is_resumed_from_its_shards(
    ray_cluster: Connection, s3_store: S3Store, tmp_path: Path
) -> None:
    shards = write_digit_shards(tmp_path / "digits")
    settings = ("model.name=vgg_cifar", "train.ema_decay=0.9", "train.schedule={name: constant, warmup_epochs: 0.5}", "data.test=null")
    tracking = f"workspace.tracking_uri=sqlite:///{tmp_path}/mlflow.db"
    copied = digits_job(shards, tmp_path, *settings, "train.epochs=3")
    api.train(copied, name="copied")

    sharded = digits_job(shards, f"{s3_store.bucket_uri}/work", *settings, tracking, "train.epochs=2", "train.parallelism=fsdp")
    api.train(sharded, name="sharded")
    run_uri = f"{s3_store.bucket_uri}/work/runs/sharded"
    stored = storage.read_bytes(f"{run_uri}/job.yaml")
    storage.write_bytes(f"{run_uri}/job.yaml", stored.replace(b"epochs: 2", b"epochs: 3", 1))
    seen: list[float] = []
    api.train(sharded, resume="sharded", on_epoch=lambda metrics: seen.append(metrics["epoch"]))

    assert seen == [2]
    parts = [uri.rpartition("/shards/")[2] for uri in storage.list_files(run_uri) if "/shards/" in uri]
    assert set(parts) == {"rank-00000.zip", "rank-00001.zip"}
    one, other = load_history(str(tmp_path / "runs" / "copied")), load_history(run_uri)
    assert [epoch["order_digest"] for epoch in one] == [epoch["order_digest"] for epoch in other]
    assert [epoch["train_loss"] for epoch in one] == pytest.approx([epoch["train_loss"] for epoch in other], rel=2e-2)
    assert other[-1]["val_top1"] == pytest.approx(one[-1]["val_top1"], abs=0.05)
