"""Runs, versions and aliases on a real MLflow with SQLite."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from eagleray.artifacts.package import ModelCard, load_card, load_examples, load_package, save_package
from eagleray.artifacts.registry import Registry
from eagleray.config.load import build_job
from eagleray.config.schema import ModelConfig, WorkspaceConfig
from eagleray.data.transforms import Preprocessing
from eagleray.errors import RegistryError
from eagleray.models.zoo import build_model
from eagleray.ports import free_ports

CNN = ModelConfig(name="cnn", params={"width": 4})


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = Registry(WorkspaceConfig(root=str(tmp_path_factory.mktemp("workspace"))))
    for number in (1, 2, 3):
        registry.register("pets", f"/packages/{number}", "", {"val_top1": str(number)})
    registry.set_alias("pets", "champion", 2)
    return registry


def test_versions_come_newest_first_with_their_aliases(registry: Registry) -> None:
    versions = registry.versions("pets")
    assert [version.version for version in versions] == [3, 2, 1]
    assert versions[1].aliases == ("champion",)
    assert versions[0].tags["val_top1"] == "3"


def test_a_reference_is_an_alias_or_a_number(registry: Registry) -> None:
    assert registry.resolve("pets@champion").package_uri == "/packages/2"
    assert registry.resolve("pets:3").version == 3


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("pest@champion", r"no model 'pest'.*did you mean 'pets'"),
        ("pets@champoin", r"no alias 'champoin' \(did you mean 'champion'\?\)"),
        ("pets:9", r"no version '9'; its versions: 1, 2, 3"),
        ("pets", r"give a version as name@alias"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(registry: Registry, reference: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        registry.resolve(reference)


def test_an_alias_moves_and_events_keep_the_order(registry: Registry) -> None:
    registry.set_alias("pets", "challenger", 1)
    registry.set_alias("pets", "challenger", 3)
    assert registry.resolve("pets@challenger").version == 3
    for number in range(3):
        registry.record_event("pets", "test", {"number": number})
    assert [event["number"] for event in registry.events("pets") if event["kind"] == "test"] == [0, 1, 2]


def test_the_running_experiment_is_kept_until_it_ends(registry: Registry) -> None:
    assert registry.load_experiment("pets") is None
    registry.save_experiment("pets", {"salt": "x"})
    assert registry.load_experiment("pets") == {"salt": "x"}
    registry.save_experiment("pets", None)
    assert registry.load_experiment("pets") is None


def test_a_run_keeps_its_job_and_its_curves(registry: Registry) -> None:
    job = build_job({"name": "pets", "data": {"train": "a", "val": "b"}})
    run_id = registry.start_run("run-1", job, {"kind": "train"})
    for epoch in range(3):
        registry.log_metrics(run_id, {"val_top1": 0.1 * epoch}, step=epoch)
    registry.end_run(run_id)
    run = registry._client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.optimizer.lr"] == "0.5"
    assert [point.value for point in registry._client.get_metric_history(run_id, "val_top1")] == pytest.approx([0.0, 0.1, 0.2])


def test_a_long_job_file_is_kept_whole(registry: Registry) -> None:
    families = {f"family{i}": {"width": {"choice": list(range(1000))}} for i in range(5)}
    job = build_job({"name": "pets", "data": {"train": "a", "val": "b"}, "tune": {"families": families}})
    run = registry._client.get_run(registry.start_run("run-2", job, {}))
    assert build_job(yaml.safe_load(Path(run.data.tags["job_uri"]).read_text())) == job


def test_jobs_that_start_at_once_share_a_new_registry_quietly(tmp_path: Path) -> None:
    code = (
        "import sys; from eagleray.artifacts.registry import Registry; from eagleray.config.schema import WorkspaceConfig; "
        "print(Registry(WorkspaceConfig(root=sys.argv[1])).register('pets', '/packages/1', '', {}).version)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "not" / "there" / "yet")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert sorted(outputs) == [("1\n", ""), ("2\n", "")]


def test_a_model_is_found_among_hundreds(tmp_path: Path) -> None:
    registry = Registry(WorkspaceConfig(root=str(tmp_path)))
    registry.register("zebras", "/packages/1", "", {})
    for number in range(101):  # MLflow lists a hundred at a time
        registry._client.create_registered_model(f"model{number}")
    assert registry.resolve("zebras:1").package_uri == "/packages/1"
    assert [version.name for version in registry.versions()] == ["zebras"]
    with pytest.raises(RegistryError, match=r"did you mean 'zebras'"):
        registry.resolve("zebra:1")


def test_a_server_that_is_not_there_is_named_at_once(tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(RegistryError, match=rf"workspace.tracking_uri '{uri}': nobody listens there"):
        Registry(WorkspaceConfig(root=str(tmp_path), tracking_uri=uri)).versions()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to look like one" * 100)
    with pytest.raises(RegistryError, match=r"mlflow.db' cannot be used: .*file is not a database; check workspace.tracking_uri"):
        Registry(WorkspaceConfig(root=str(tmp_path))).versions()


def save(uri: str, examples: NDArray[np.uint8] | None = None) -> ModelCard:
    torch.manual_seed(0)
    card = ModelCard(
        name="pets",
        model=CNN,
        classes=["cat", "dog"],
        preprocessing=Preprocessing(image_size=8, eval_resize=8),
        metrics={"val_top1": 0.5},
        run_name="run-1",
        data_digest="d",
        job={},
        code_version="1",
    )
    return save_package(uri, build_model(CNN, 2, 8).state_dict(), card, examples)


def test_a_package_comes_back_as_the_same_model(tmp_path: Path) -> None:
    card = save(str(tmp_path))
    loaded, model = load_package(str(tmp_path))
    assert loaded == card == load_card(str(tmp_path))
    torch.manual_seed(0)
    images = torch.ones(1, 3, 8, 8)
    torch.testing.assert_close(model(images), build_model(CNN, 2, 8).eval()(images))


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    save(str(tmp_path))
    weights = tmp_path / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(RegistryError, match="do not match the digest"):
        load_package(str(tmp_path))


def test_example_pictures_travel_with_the_weights(tmp_path: Path) -> None:
    examples = np.stack([np.full((8, 8, 3), 20 * i, np.uint8) for i in range(10)])
    card = save(str(tmp_path), examples)
    found = load_examples(str(tmp_path), load_card(str(tmp_path)))
    assert found is not None and found.shape == examples.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - examples).max() <= 2

    path = tmp_path / "examples.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(RegistryError, match=r"the example pictures do not match the digest in card.json; .* register again"):
        load_examples(str(tmp_path), card)
    path.unlink()
    with pytest.raises(RegistryError, match=r"examples.parquet, of which card.json speaks, is missing; register again"):
        load_examples(str(tmp_path), card)


@pytest.mark.parametrize("examples", [None, np.empty((0, 8, 8, 3), np.uint8)])
def test_a_package_may_hold_no_pictures(tmp_path: Path, examples: NDArray[np.uint8] | None) -> None:
    card = save(str(tmp_path), examples)
    assert load_examples(str(tmp_path), card) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "weights.safetensors"]


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"no model package there \(no card.json\)"):
        load_card(str(tmp_path))


def test_a_resumed_run_goes_on_in_its_mlflow_run_with_the_machines_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    registry = Registry(WorkspaceConfig(root=str(tmp_path)))
    job = build_job({"name": "pets", "workspace": {"root": str(tmp_path)}, "data": {"train": "a", "val": "b"}})
    assert registry.reopen_run("first", job) is None
    run_id = registry.start_run("first", job, {"git_dirty": "false"})
    registry.log_metrics(run_id, {"val_top1": 0.5}, step=0)
    registry.end_run(run_id, "FAILED")
    assert registry.reopen_run("second", job) is None
    assert registry.reopen_run("first", job) == run_id
    with registry.system_metrics(run_id):
        deadline = time.monotonic() + 60
        while "system/cpu_utilization_percentage" not in registry._client.get_run(run_id).data.metrics:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    registry.log_metrics(run_id, {"val_top1": 0.6}, step=1)
    registry.log_artifact(run_id, "learning_curve.png", b"png")
    registry.end_run(run_id)
    run = registry._client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.tags["git_dirty"] == "false"
    assert [point.value for point in registry._client.get_metric_history(run_id, "val_top1")] == [0.5, 0.6]
    assert sorted(file.path for file in registry._client.list_artifacts(run_id)) == ["job.yaml", "learning_curve.png"]
