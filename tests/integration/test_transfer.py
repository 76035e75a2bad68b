"""Starting from trained weights: it pays, what is frozen stays, and a run goes on in the middle of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import S3Store
from loop_for_tests import run
from shards_for_tests import digits_job, write_digit_shards

from eagleray import api, storage
from eagleray.artifacts.package import load_card, load_package
from eagleray.artifacts.runs import load_run_job
from eagleray.cluster.connect import Connection
from eagleray.errors import ConfigError, RegistryError
from eagleray.models.zoo import build_model

pytestmark = pytest.mark.slow

RESNET = 'model={name: resnet_cifar, params: {depth: 8, width: 8}, pretrained: "PATH"}'
HEAD = {"8.weight", "8.bias"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digit_shards(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def parity_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classes `even` and `odd`, with only 48 training pictures."""
    return write_digit_shards(tmp_path_factory.mktemp("parity"), num_train=48, class_of=lambda digit: ("even", "odd")[digit % 2])


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Random weights of the network in RESNET, for seven classes."""
    job = digits_job(tmp_path, tmp_path, RESNET)
    torch.manual_seed(5)
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": build_model(job.model, 7, 8).state_dict()}, path)
    return path


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}


def test_a_registered_model_is_a_head_start_for_other_classes(
    ray_cluster: Connection, shards: Path, parity_shards: Path, tmp_path: Path
) -> None:
    """Whether a digit is odd, from few pictures, by a model that knows digits: on two workers, frozen at first."""
    api.train(digits_job(shards, tmp_path, "train.epochs=6", "data.test=null"), name="digits", alias="champion")

    few = ("train.epochs=2", "train.global_batch_size=16", "train.optimizer.lr=0.003", "train.deterministic=true", "data.test=null")
    from_scratch = [pause.metrics["val_top1"] for pause in run(digits_job(parity_shards, tmp_path, *few, "train.num_workers=1"))]
    job = digits_job(
        parity_shards,
        tmp_path,
        *few,
        "name=parity",
        "model.pretrained=digits@champion",
        "train.finetune={freeze_epochs: 1, layer_decay: 0.8, head_lr_factor: 3}",
    )
    tuned = api.train(job, name="tuned")
    assert tuned.metrics["val_top1"] > 0.85
    assert tuned.metrics["val_top1"] > max(from_scratch) + 0.3

    card = load_card(tuned.version.package_uri)
    package = str(tmp_path / "models" / "digits" / "digits")
    assert card.model.pretrained.source == package and card.model.pretrained.sha256 == load_card(package).weights_sha256
    assert card.classes == ["even", "odd"]
    # To be used it needs the weights it came from no more.
    (Path(package) / "weights.safetensors").unlink()
    assert load_package(tuned.version.package_uri)[1](torch.zeros(1, 3, 8, 8)).shape == (1, 2)


def test_the_body_is_frozen_for_some_epochs_and_a_part_for_good(
    ray_cluster: Connection, shards: Path, weights: Path, tmp_path: Path
) -> None:
    job = digits_job(
        shards,
        tmp_path,
        RESNET.replace("PATH", str(weights)),
        "train.finetune={freeze_epochs: 1, freeze: ['0', '1']}",
        "train.epochs=2",
        "train.num_workers=1",
        "train.optimizer.weight_decay=0.1",
    )
    start = torch.load(weights)["state_dict"]
    first, second = (pause.state()["weights"] for pause in run(job))
    assert differing(start | {name: torch.zeros_like(first[name]) for name in HEAD}, first) == HEAD, "norms keep their statistics too"
    changed = differing(first, second)
    assert changed == {name for name in start if not name.startswith(("0.", "1."))}


def test_a_run_resumed_around_the_end_of_freezing_ends_like_an_undisturbed_one(
    ray_cluster: Connection, shards: Path, weights: Path, tmp_path: Path
) -> None:
    """Bit for bit, from within the frozen epoch and from its end, though the trained weights are gone by then."""
    job = digits_job(
        shards,
        tmp_path,
        RESNET.replace("PATH", str(weights)),
        "train.finetune={freeze_epochs: 1, layer_decay: 0.7, head_lr_factor: 2}",
        "train.epochs=2",
        "train.num_workers=1",
        "train.deterministic=true",
        "train.ema_decay=0.9",
        "train.checkpoint_every_steps=10",
    )
    whole = run(job)
    assert [pause.is_epoch_end for pause in whole] == [False, True, False, True]
    weights.unlink()
    for pause in whole[:3]:
        resumed = run(job, resume=pause.state())
        assert resumed[-1].metrics["train_loss"] == whole[-1].metrics["train_loss"]
        assert differing(resumed[-1].state()["weights"], whole[-1].state()["weights"]) == set()
    with pytest.raises(ConfigError, match=r"weights.pt': no file or model package there"):
        run(job)


def test_weights_on_s3_are_loaded_by_each_worker(
    ray_cluster: Connection, s3_store: S3Store, shards: Path, weights: Path, tmp_path: Path
) -> None:
    uri = f"{s3_store.bucket_uri}/weights.pt"
    storage.write_bytes(uri, weights.read_bytes())
    job = digits_job(shards, tmp_path, RESNET.replace("PATH", uri), "train.finetune.freeze_epochs=1", "train.epochs=1", "data.test=null")
    api.train(job, name="s3")
    stored = load_run_job(job.workspace.runs_uri, "s3").model.pretrained
    assert stored.source == uri and stored.sha256 == storage.sha256_hex(weights.read_bytes())
    _, model = load_package(str(tmp_path / "models" / "digits" / "s3"))
    start = torch.load(weights)["state_dict"]
    assert {name for name, tensor in model.state_dict().items() if name not in start or not torch.equal(tensor, start[name])} == HEAD


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.finetune.freeze_epochs=1"], "freezes random weights; give model.pretrained"),
        (["model.pretrained=PATH", "train.finetune.freeze=[feature]"], r"no part 'feature' \(did you mean 'features'\?\)"),
        (["model.pretrained=PATH", "train.finetune.freeze=[features, classifier]"], "leaves nothing to train"),
        (["model.pretrained=PATH", "train.finetune={freeze: [classifier], freeze_epochs: 1}"], "trains the head alone, but 'cnn' has none"),
        (["model.pretrained=PATH"], r"does not fit model 'cnn' at 8 px: .*missing \(features.0.weight"),
        (["model.pretrained=digits@champion"], "no model 'digits' in the registry"),
        (["model.pretrained=nowhere.pt"], "no file or model package there"),
    ],
)
def test_a_start_that_cannot_be_is_refused_before_the_run(
    overrides: list[str], message: str, ray_cluster: Connection, shards: Path, weights: Path, tmp_path: Path
) -> None:
    job = digits_job(shards, tmp_path, *(override.replace("PATH", str(weights)) for override in overrides))
    with pytest.raises((ConfigError, RegistryError), match=message):
        api.train(job, name="refused")
    assert not (tmp_path / "runs" / "refused").exists()
