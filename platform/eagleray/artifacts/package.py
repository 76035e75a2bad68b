"""A model version at rest: `weights.safetensors` and `card.json`, all that serving needs; example pictures and a signature if there are any.

The class names and the preprocessing travel with the weights, so that serving cannot drift from
training; the digests of weights, data and job let anybody walk back from an answer to its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from eagleray import storage
from eagleray.artifacts import signing
from eagleray.config.schema import ModelConfig, Section
from eagleray.data.decode import decode_rgb
from eagleray.data.transforms import Preprocessing
from eagleray.errors import RegistryError

if TYPE_CHECKING:
    import torch

CARD_NAME = "card.json"
WEIGHTS_NAME = "weights.safetensors"
EXAMPLES_NAME = "examples.parquet"

EXAMPLE_QUALITY = 95
"""Of JPEG: what back ends are compared on need not be what the data set holds to the last bit."""


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
    examples_sha256: str = ""
    """Likewise; empty: no example pictures."""


def save_package(uri: str, state_dict: dict[str, torch.Tensor], card: ModelCard, examples: NDArray[np.uint8] | None = None) -> ModelCard:
    """Write weights, examples and card under `uri`, the card last; return the card with the digests.

    The package is signed where the environment names a key (see `signing`).

    Args:
        examples: pictures as the model sees them before they are normalised, uint8 [N, S, S, 3].

    Raises:
        ConfigError: the environment names a key that is none.
        StorageError: `uri` cannot be written.
    """
    from safetensors.torch import save

    key = signing.signing_key()
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()})
    encoded = b"" if examples is None or not len(examples) else _encode(examples)
    digests = {"weights_sha256": storage.sha256_hex(weights), "examples_sha256": storage.sha256_hex(encoded) if encoded else ""}
    card = card.model_copy(update=digests)
    storage.write_bytes(storage.join(uri, WEIGHTS_NAME), weights)
    if encoded:
        storage.write_bytes(storage.join(uri, EXAMPLES_NAME), encoded)
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


def load_examples(uri: str, card: ModelCard) -> NDArray[np.uint8] | None:
    """Read the example pictures of the package at `uri`: uint8 [N, S, S, 3]; None: it holds none.

    Raises:
        RegistryError: they are not those that `card`, the package's, speaks of.
    """
    if not card.examples_sha256:
        return None
    examples_uri = storage.join(uri, EXAMPLES_NAME)
    if not storage.exists(examples_uri):
        raise RegistryError(f"'{uri}': {EXAMPLES_NAME}, of which {CARD_NAME} speaks, is missing; register again")
    encoded = storage.read_bytes(examples_uri)
    if storage.sha256_hex(encoded) != card.examples_sha256:
        raise RegistryError(
            f"'{uri}': the example pictures do not match the digest in {CARD_NAME}; they were changed or damaged, register again"
        )
    images = pq.read_table(pa.BufferReader(encoded))["image"].to_pylist()
    return np.stack([decode_rgb(image) for image in images])


def _encode(examples: NDArray[np.uint8]) -> bytes:
    images = [simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), EXAMPLE_QUALITY, colorsubsampling="444") for rgb in examples]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), sink, compression="none")
    return bytes(sink.getvalue())
