"""A wrong job file is refused in one line that names the key and the cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eagleray.config.load import build_job, dump_job, load_job, with_values
from eagleray.errors import ConfigError

JOB: dict[str, Any] = {"name": "pets", "data": {"train": "shards/train", "val": "shards/val"}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"unknown key 'train.epoch' \(did you mean 'epochs'\?\)"),
        ("train.optimizer.lrr=0.1", r"unknown key 'train.optimizer.lrr' \(did you mean 'lr'\?\)"),
        ("serve.backend=openvino-int8", r"openvino-int8 changes answers; .*serve.int8_agreement, the least share"),
        ("trian.epochs=3", r"unknown key 'trian' \(did you mean 'train'\?\)"),
        ("tune.families={cnn: {width: {choise: [1]}}}", r"unknown key 'tune.families.cnn.width.choise' \(did you mean 'choice'\?\)"),
        ("train.optimizer.lr=-1", r"'train.optimizer.lr': input should be greater than 0, got -1"),
        ("train.num_workers={min: 4, max: 2}", r"min 4 is above max 2"),
        ("train.global_batch_size=100", r"100 is not a multiple of data.lanes 8; use 96"),
        ("train.num_workers=3", r"data.lanes 8 is not a multiple of train.num_workers 3; set data.lanes to 9"),
        ("train.accumulate=3", r"accumulate 3 does not divide the 1024 pictures that each of 1 workers takes.*use a divisor of 1024"),
        ("data.train_size={start: 160, end: 192, ramp_epochs: [13, 11]}", r"data.train_size.ramp_epochs: the range \[13, 11\] is inverted"),
        ("data.train_size={start: 160, ned: 192}", r"unknown key 'data.train_size.ned' \(did you mean 'end'\?\)"),
        ("train.schedule.name=onecycle", r"'train.schedule.name': input should be .*'one_cycle'"),
        ("train.epochs=5", r"warmup_epochs 5.0 must be below train.epochs 5"),
        ("data.augment.crop_scale=[1.0, 0.5]", r"range \[1.0, 0.5\] is inverted"),
        ("ingest.split={val: 0.6, test: 0.5}", r"leaves none for 'train'"),
        ("workspace.root=s3://bucket/x", r"workspace.tracking_uri is needed"),
        ("name=Not A Name", r"'name'"),
        ("tune.families={cnn: {width: {uniform: [2, 1]}}}", r"range \[2.0, 1.0\] is inverted"),
        ("tune.families={cnn: {width: {uniform: [1, 2], choice: [1]}}}", r"exactly one of"),
        ("no-equals-sign", r"expected dotted.key=value"),
    ],
)
def test_what_cannot_be_is_refused_with_key_and_cure(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        build_job(JOB, [override])
    assert "\n" not in str(raised.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'data.val' is missing"):
        build_job({"name": "pets", "data": {"train": "a"}})


def test_overrides_are_yaml_values() -> None:
    job = build_job(
        JOB, ["train.optimizer.lr=1e-3", "data.augment.crop_scale=null", "train.num_workers={min: 1, max: 4}", "model.params.width=8"]
    )
    assert job.train.optimizer.lr == 0.001
    assert job.data.augment.crop_scale is None
    assert (job.train.min_workers, job.train.max_workers) == (1, 4)
    assert job.model.params == {"width": 8}


def test_the_resolved_job_file_reads_back_the_same(tmp_path: Path) -> None:
    job = build_job(JOB, ["train.epochs=7", "train.num_workers={min: 2, max: 4}"])
    path = tmp_path / "job.yaml"
    path.write_text(dump_job(job))
    assert load_job(path) == job


def test_with_values_checks_again() -> None:
    job = build_job(JOB)
    assert with_values(job, {"train.epochs": 3, "train.schedule.warmup_epochs": 1}).train.epochs == 3
    with pytest.raises(ConfigError, match="warmup_epochs"):
        with_values(job, {"train.epochs": 3})


@pytest.mark.parametrize(("text", "message"), [("- a", "this is a list"), ("", "this is empty"), ("a: [", "not valid YAML")])
def test_a_file_that_is_no_mapping_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_job(path)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match="no such job file"):
        load_job("nowhere.yaml")


def test_the_job_files_that_users_copy_are_valid(repository: Path) -> None:
    files = sorted((repository / "jobs").glob("*.yaml"))
    assert {"quickstart", "train_resnet50_imagenet", "fine_tune"} <= {path.stem for path in files}
    for path in files:
        load_job(path)


def test_relative_paths_are_those_of_where_the_job_was_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers have working directories of their own."""
    monkeypatch.chdir(tmp_path)
    job = build_job({"name": "pets", "data": {"train": [{"uri": "./data/train"}], "val": "data/val"}})
    assert job.data.train_parts[0].uri == str(tmp_path / "data" / "train")
    assert job.data.val == str(tmp_path / "data" / "val")
    assert job.workspace.root == str(tmp_path / "eagleray")
    with pytest.raises(ConfigError, match=r"data.val: .*the scheme 'gs://' is not supported"):
        build_job({"name": "pets", "data": {"train": "data/train", "val": "gs://bucket/val"}})
