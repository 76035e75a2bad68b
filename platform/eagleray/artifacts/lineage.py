"""The chain from a model version back to the pictures it was made of, link by link: what matches, and what does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from eagleray import storage
from eagleray.artifacts import signing
from eagleray.artifacts.checkpoint import load_state
from eagleray.artifacts.package import CARD_NAME, ModelCard, load_card, load_examples, load_weights
from eagleray.artifacts.registry import ModelVersion, Registry
from eagleray.artifacts.runs import BEST_NAME, load_quarantine, load_run_job
from eagleray.config.schema import JobConfig
from eagleray.data import inspection
from eagleray.data.mixture import load_training_set
from eagleray.errors import EagleRayError


@dataclass(frozen=True)
class Link:
    """One link of the chain: `holds`, `broken`, or `unknown` where there is nothing to compare with; `detail` says what was compared."""

    name: str
    status: Literal["holds", "broken", "unknown"]
    detail: str


class _Unknown(Exception):
    """There is nothing to compare with."""


def verify_lineage(
    registry: Registry, version: ModelVersion, code_version: str, *, trusted_keys: Sequence[str] = (), with_shards: bool = False
) -> list[Link]:
    """Walk from a version's signature to its data and say of each link whether it holds; one that is broken stops nothing.

    Args:
        code_version: of the code that runs here.
        trusted_keys: public keys that may have signed it; none: any signature that fits is named.
        with_shards: also read the data set in full and compare every shard's digest.
    """
    card = load_card(version.package_uri)
    checks: dict[str, Callable[[], str]] = {
        "signature": lambda: _signature(version, trusted_keys),
        "weights": lambda: _weights(version, card),
        "examples": lambda: _examples(version, card),
        "run": lambda: _run(registry, version, card),
        "job file": lambda: _job(registry, card),
        "code": lambda: _code(card, code_version),
        "data": lambda: _data(card),
        "quarantine": lambda: _quarantine(registry, card),
    }
    if with_shards:
        checks["shards"] = lambda: _shards(card)
    return [_link(name, check) for name, check in checks.items()]


def _link(name: str, check: Callable[[], str]) -> Link:
    try:
        return Link(name, "holds", check())
    except _Unknown as reason:
        return Link(name, "unknown", str(reason))
    except EagleRayError as error:
        return Link(name, "broken", str(error))


class _Broken(EagleRayError):
    """Two things that should be the same are not."""


def _same(what: str, here: Any, there: Any) -> None:
    if here != there:
        raise _Broken(f"{what}: {_short(here)} in the card, {_short(there)} there")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _signature(version: ModelVersion, trusted_keys: Sequence[str]) -> str:
    card = storage.read_bytes(storage.join(version.package_uri, CARD_NAME))
    if trusted_keys:
        signing.check_signed(version.package_uri, card, trusted_keys)
    by = signing.signer(version.package_uri, card)
    if by is None:
        raise _Unknown("not signed")
    return f"signed by {by}{'' if trusted_keys else '; say whom you trust with --key to compare'}"


def _weights(version: ModelVersion, card: ModelCard) -> str:
    load_weights(version.package_uri, card)
    _same("digest of the weights in the registry", card.weights_sha256, version.tags.get("weights_sha256"))
    return f"sha256 {card.weights_sha256}"


def _examples(version: ModelVersion, card: ModelCard) -> str:
    examples = load_examples(version.package_uri, card)
    if examples is None:
        raise _Unknown("the package holds no pictures")
    return f"{len(examples)} pictures, sha256 {card.examples_sha256}"


def _run(registry: Registry, version: ModelVersion, card: ModelCard) -> str:
    best_uri = storage.join(registry.workspace.runs_uri, card.run_name, BEST_NAME)
    if not storage.list_files(best_uri):
        raise _Unknown(f"run '{card.run_name}': its weights are not kept in {registry.workspace.runs_uri}")
    kept, packaged = load_state(best_uri)["weights"], load_weights(version.package_uri, card)
    _same("names of the run's best weights", sorted(packaged), sorted(kept))
    for name, tensor in packaged.items():
        if not tensor.equal(kept[name].contiguous()):
            raise _Broken(f"'{name}' is not what run '{card.run_name}' has kept as its best weights")
    return f"run '{card.run_name}': its best weights are these"


def _job(registry: Registry, card: ModelCard) -> str:
    try:
        job = load_run_job(registry.workspace.runs_uri, card.run_name)
    except EagleRayError:
        raise _Unknown(f"run '{card.run_name}': its job file is not kept in {registry.workspace.runs_uri}") from None
    recorded = job.model_dump(mode="json")
    for key in sorted(recorded.keys() | card.job.keys()):
        _same(f"job file, key '{key}'", card.job.get(key), recorded.get(key))
    return f"{storage.join(registry.workspace.runs_uri, card.run_name)}"


def _code(card: ModelCard, code_version: str) -> str:
    if "+changes" in card.code_version:
        raise _Unknown(f"{card.code_version}: made with changes that were not committed")
    if card.code_version != code_version:
        raise _Unknown(f"made by {card.code_version}; here runs {code_version}")
    return card.code_version


def _data(card: ModelCard) -> str:
    training_set = load_training_set(_job_of(card).data)
    _same(f"digest of {training_set}", card.data_digest, training_set.digest)
    return f"{training_set}: digest {card.data_digest}"


def _quarantine(registry: Registry, card: ModelCard) -> str:
    run_uri = storage.join(registry.workspace.runs_uri, card.run_name)
    _same("quarantined pictures", card.quarantined, load_quarantine(run_uri))
    return f"{len(card.quarantined)} pictures were left out"


def _shards(card: ModelCard) -> str:
    problems = [problem for part in _job_of(card).data.train_parts for problem in inspection.verify(part.uri)]
    if problems:
        raise _Broken(f"{len(problems)} shards are not what the manifest says; the first: {problems[0]}")
    return "every shard is what the manifest says"


def _job_of(card: ModelCard) -> JobConfig:
    try:
        return JobConfig.model_validate(card.job)
    except ValidationError as error:
        raise _Broken(f"job file in the card: {error.error_count()} keys that this version of eagleray does not know") from None
