"""A model version at rest: `weights.safetensors` and `card.json`, all that serving needs, and a signature if there is one.

The class names and the preprocessing travel with the weights, so that serving cannot drift from
training; the digests of weights, data and job let anybody walk back from an answer to its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from eagleray import storage
from eagleray.artifacts import signing
from eagleray.config.schema import ModelConfig, Section
from eagleray.data.transforms import Preprocessing
from eagleray.errors import RegistryError

if TYPE_CHECKING:
    import torch

CARD_NAME = "card.json"
WEIGHTS_NAME = "weights.safetensors"


class ModelCard(Section):
    """What a person, and the server, must know about the weights beside it."""

    name: str
    """Name of the registered model."""
    model: ModelConfig
    classes: list[str]
    preprocessing: Preprocessing
    metrics: dict[str, float]
    """Fractions and losses on the splits named in the keys (`val_top1`, `test_top1`)."""
    run_name: str
    data_digest: str
    """Digest of the training split's manifest."""
    quarantined: list[dict[str, str]] = Field(default_factory=list)
    """Training pictures that could not be decoded: key, shard and reason of each."""
    job: dict[str, Any]
    """The resolved job file."""
    code_version: str
    weights_sha256: str = ""
    """Filled in by `save_package`."""


def save_package(uri: str, state_dict: dict[str, torch.Tensor], card: ModelCard) -> ModelCard:
    """Write weights and card under `uri`, the card last; return the card with the weights' digest.

    The package is signed where the environment names a key (see `signing`).

    Raises:
        ConfigError: the environment names a key that is none.
        StorageError: `uri` cannot be written.
    """
    from safetensors.torch import save

    key = signing.signing_key()
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()})
    card = card.model_copy(update={"weights_sha256": storage.sha256_hex(weights)})
    storage.write_bytes(storage.join(uri, WEIGHTS_NAME), weights)
    card_bytes = card.model_dump_json(indent=2).encode()
    if key is not None:
        signing.sign(uri, card_bytes, key)
    storage.write_bytes(storage.join(uri, CARD_NAME), card_bytes)
    return card


def load_card(uri: str, trusted_keys: Sequence[str] = ()) -> ModelCard:
    """Read the card of the package at `uri`.

    Args:
        trusted_keys: public keys, one of which must have signed it; none: it need not be signed.

    Raises:
        RegistryError: there is no package, its card is damaged, or nobody trusted has signed it.
    """
    card_uri = storage.join(uri, CARD_NAME)
    if not storage.exists(card_uri):
        raise RegistryError(f"'{uri}': no model package there (no {CARD_NAME}); was it deleted?")
    card = storage.read_bytes(card_uri)
    if trusted_keys:
        signing.check_signed(uri, card, trusted_keys)
    try:
        return ModelCard.model_validate_json(card)
    except ValidationError as error:
        raise RegistryError(f"'{card_uri}': damaged or of another version ({error.error_count()} problems)") from None


def load_package(uri: str, trusted_keys: Sequence[str] = ()) -> tuple[ModelCard, torch.nn.Module]:
    """Read, verify and build the model of the package at `uri`, in evaluation mode on the CPU.

    Args:
        trusted_keys: as of `load_card`.

    Raises:
        RegistryError: no package, nobody trusted has signed it, or the weights are not those the card speaks of.
    """
    from eagleray.models.weights import restore_weights
    from eagleray.models.zoo import build_model

    card = load_card(uri, trusted_keys)
    model = build_model(card.model, len(card.classes), card.preprocessing.image_size)
    restore_weights(model, load_weights(uri, card))
    return card, model.eval()


def load_weights(uri: str, card: ModelCard) -> dict[str, torch.Tensor]:
    """Read the weights of the package at `uri`.

    Raises:
        RegistryError: they are not those that `card`, the package's, speaks of.
    """
    from safetensors.torch import load

    weights = storage.read_bytes(storage.join(uri, WEIGHTS_NAME))
    if storage.sha256_hex(weights) != card.weights_sha256:
        raise RegistryError(f"'{uri}': the weights do not match the digest in {CARD_NAME}; they were changed or damaged, register again")
    tensors: dict[str, torch.Tensor] = load(weights)
    return tensors
