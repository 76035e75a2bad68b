"""Trained weights to start from: where they are, that they are the right ones, and that they fit."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

from eagleray import storage
from eagleray.config.load import with_values
from eagleray.config.schema import JobConfig, ModelConfig, PretrainedConfig
from eagleray.errors import ConfigError, near_miss

if TYPE_CHECKING:
    import torch
    from torch import nn

    from eagleray.artifacts.package import ModelCard


@dataclass(frozen=True)
class _Weights:
    data: bytes
    uri: str
    """Of the file that holds them."""
    card: ModelCard | None = None
    """Of the package they are from."""


def pin_pretrained(job: JobConfig, classes: list[str]) -> JobConfig:
    """Return the job with the weights' place and digest in `model.pretrained`, once they are found to fit.

    A version of the registry becomes the URI of its package, so that the run does not depend on what an alias means later.

    Args:
        classes: names of the classes that the job trains on.

    Raises:
        ConfigError: they cannot be found, read or fetched, or do not fit the model.
        RegistryError: no such version, or its package is damaged.
    """
    from eagleray.models.zoo import build_model

    pretrained = job.model.pretrained
    if pretrained is None:
        return job
    if pretrained.is_reference:
        from eagleray.artifacts.registry import Registry

        pretrained = pretrained.model_copy(update={"source": Registry(job.workspace).resolve(pretrained.source).package_uri})
    elif pretrained.is_uri:
        pretrained = pretrained.model_copy(update={"source": storage.normalize_uri(pretrained.source)})
    config = job.model.model_copy(update={"pretrained": pretrained})
    digest = load_pretrained(build_model(config, len(classes), job.data.image_size), config, classes, job.data.image_size)
    return with_values(job, {"model.pretrained": {"source": pretrained.source, "sha256": digest}})


def load_pretrained(model: nn.Module, config: ModelConfig, classes: list[str], image_size: int) -> str:
    """Load the weights that `config.pretrained` names into `model`, and return their sha256.

    The head stays as it is if theirs has another size or, where they are of a package, is for other classes.

    Raises:
        ConfigError: they cannot be found, read or fetched, are not those the job was started with, or do not fit.
    """
    from eagleray.models.layers import head_names
    from eagleray.models.weights import fit_weights

    assert config.pretrained is not None
    found = _find(config)
    digest = storage.sha256_hex(found.data)
    expected = config.pretrained.sha256 or (found.card.weights_sha256 if found.card else digest)
    if digest != expected:
        raise ConfigError(
            f"model.pretrained '{found.uri}': its sha256 is {digest[:12]}…, not {expected[:12]}…: the file was changed or damaged; "
            "restore it, or start a new run with model.pretrained.sha256 left out"
        )
    weights, head = _decode(found), head_names(config, len(classes), image_size)
    try:
        fit_weights(model, weights, head, keep_head=found.card is None or found.card.classes == classes)
    except ConfigError as error:
        theirs = f" (of a '{found.card.model.name}' with {found.card.model.params})" if found.card else ""
        raise ConfigError(
            f"model.pretrained '{found.uri}'{theirs} does not fit model '{config.name}' at {image_size} px: {error}; "
            "give weights of the same architecture, or change model.name, model.params or model.stem"
        ) from None
    return digest


def _find(config: ModelConfig) -> _Weights:
    from eagleray.artifacts.package import CARD_NAME, WEIGHTS_NAME, load_card

    assert config.pretrained is not None
    if config.pretrained.is_torchvision:
        path = _fetch(config.name, config.pretrained)
        return _Weights(path.read_bytes(), str(path))
    uri = config.pretrained.source
    if storage.exists(storage.join(uri, CARD_NAME)):
        file_uri = storage.join(uri, WEIGHTS_NAME)
        return _Weights(storage.read_bytes(file_uri), file_uri, load_card(uri))
    if not storage.exists(uri) or (storage.is_local(uri) and os.path.isdir(uri)):
        raise ConfigError(f"model.pretrained '{uri}': no file or model package there; check the path, which every worker must see")
    return _Weights(storage.read_bytes(uri), uri)


def _fetch(name: str, pretrained: PretrainedConfig) -> Path:
    """Return the file of torchvision's weights in torch.hub's cache, fetched if it is not there."""
    import torch
    from torchvision.models import get_model_weights, list_models

    if name not in list_models():
        raise ConfigError(
            f"model.pretrained '{pretrained.source}' names torchvision's weights, but '{name}' is not torchvision's; give a path or URI"
        )
    known = get_model_weights(name).__members__
    if pretrained.source not in known:
        raise ConfigError(
            f"model.pretrained: torchvision has no weights '{pretrained.source}' for '{name}'{near_miss(pretrained.source, known)}; "
            f"it has {', '.join(known)}; or give a path or URI"
        )
    url = known[pretrained.source].url
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = torch.hub.HASH_REGEX.search(path.name)
            torch.hub.download_url_to_file(url, str(path), digest and digest.group(1), progress=False)
        except (URLError, OSError, RuntimeError) as error:
            raise ConfigError(
                f"model.pretrained '{pretrained.source}': {url} could not be fetched to {path} ({error}); fetch it elsewhere and give "
                "its local path or s3:// URI in model.pretrained"
            ) from None
    return path


def _decode(found: _Weights) -> dict[str, torch.Tensor]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    from eagleray.models.weights import unwrap_weights

    try:
        if found.uri.endswith(".safetensors"):
            document = load(found.data)
        else:
            document = torch.load(BytesIO(found.data), map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise ConfigError(
            f"model.pretrained '{found.uri}' cannot be read ({' '.join(str(error).split())[:120]}); save them with torch.save(model.state_dict(), path) or as safetensors"
        ) from None
    weights = unwrap_weights(document)
    if weights is None:
        raise ConfigError(
            f"model.pretrained '{found.uri}' holds no state dict, neither by itself nor under 'weights', 'state_dict' or 'model'"
        )
    return weights
