"""From the driver: start, look at, change and end experiments on what the endpoint serves. Every decision is an event in the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, cast

from eagleray.errors import ServingError
from eagleray.serving import endpoint, watcher
from eagleray.serving.experiment import (
    DEFAULT_GUARDRAILS,
    Experiment,
    Guardrail,
    RampStep,
    Variant,
    conclude,
    new_experiment,
    with_weights,
)

if TYPE_CHECKING:
    from eagleray.artifacts.registry import ModelVersion, Registry

CHAMPION = "champion"
CHALLENGER = "challenger"


def start(
    registry: Registry,
    name: str,
    challengers: Mapping[str, str],
    traffic: Mapping[str, float],
    *,
    shadows: Mapping[str, float] | None = None,
    outcome: Literal["proportion", "mean"] = "proportion",
    policy: Literal["fixed", "thompson"] = "fixed",
    ramp: Sequence[RampStep] = (),
    guardrails: Sequence[Guardrail] = DEFAULT_GUARDRAILS,
    salt: str | None = None,
) -> Experiment:
    """Compare other versions with the one of `name` that is served; the `champion`, which keeps the rest of the users.

    Args:
        challengers: variant → a reference (`imagenet:7`, `imagenet@challenger`) or a version number.
        traffic: variant → share of the users; a ramp sets that of the only challenger, and a shadow has none.
        shadows: variant → fraction of the requests that are copied to it; those variants answer nobody.
        salt: of an earlier experiment, to give its users the same variants again; by default a new one.

    Raises:
        RegistryError: no such version.
        ServingError: `name` is not served, an experiment is running on it, the shares cannot be, or a version is the one
            that is served.
    """
    shadows = shadows or {}
    current = endpoint.experiment(name)
    if current.is_running and len(current.variants) > 1:
        raise ServingError(f"an experiment is already running on '{name}'; promote or abort it first")
    shares = {challenger: ramp[0].share for challenger in challengers if challenger not in shadows} if ramp else dict(traffic)
    _check_shares(challengers, shares, shadows)
    versions = {variant: _version(registry, name, reference, current.answering) for variant, reference in challengers.items()}
    variants = [
        Variant(name=CHAMPION, version=current.answering.version, weight=1 - sum(shares.values())),
        *(
            Variant(name=variant, version=version.version, weight=shares.get(variant, 0.0), mirror=shadows.get(variant, 0.0))
            for variant, version in versions.items()
        ),
    ]
    experiment = new_experiment(name, variants, salt=salt, outcome=outcome, policy=policy, ramp=tuple(ramp), guardrails=tuple(guardrails))
    if experiment.is_watched:
        watcher.start(registry.workspace)
    endpoint.update_experiment(experiment, versions)
    record(registry, experiment, "ab_start", {"weights": experiment.shares, "versions": _versions(experiment)})
    return experiment


def status(registry: Registry, name: str) -> dict[str, Any]:
    """Return the figures of the running experiment, or those with which the last one ended.

    Raises:
        ServingError: there has been no experiment on `name`.
    """
    if name in endpoint.models():
        return endpoint.report(name)
    ended = [event for event in registry.events(name) if "report" in event]
    if not ended:
        raise ServingError(f"no experiment has been run on '{name}'; start one with `eagleray ab start {name}`")
    return cast("dict[str, Any]", ended[-1]["report"])


def set_weights(registry: Registry, name: str, weights: Mapping[str, float]) -> Experiment:
    """Change the split; as few users as possible change their variant. Figures start anew. Raises ServingError."""
    changed = with_weights(endpoint.experiment(name), weights, datetime.now(UTC))
    figures = endpoint.report(name)
    endpoint.update_experiment(changed)
    record(registry, changed, "ab_weights", {"weights": changed.shares, "report": figures})
    return changed


def promote(registry: Registry, name: str, variant: str | None = None, by: str | None = None) -> Experiment:
    """End the experiment: `variant` (by default the only challenger) becomes `champion` and gets all traffic.

    Args:
        by: who decides, for the event.

    Raises:
        ServingError: no experiment is running, or it is not clear which variant is meant.
    """
    experiment = _experiment_with_challengers(name)
    challengers = [v.name for v in experiment.variants[1:]]
    if variant is None and len(challengers) > 1:
        raise ServingError(f"'{name}' has the challengers {', '.join(challengers)}; say which one to promote")
    winner = experiment.variant(variant or challengers[0])
    return _end(registry, experiment, winner.name, "ab_promote", by)


def abort(registry: Registry, name: str, by: str | None = None) -> Experiment:
    """End the experiment: all traffic returns to the control. Raises ServingError."""
    experiment = _experiment_with_challengers(name)
    return _end(registry, experiment, experiment.control.name, "ab_abort", by)


def record(registry: Registry, experiment: Experiment, kind: str, details: dict[str, Any]) -> None:
    """Keep what was decided, and the experiment as it is now."""
    registry.save_experiment(experiment.model, experiment.model_dump(mode="json") if experiment.is_running else None)
    registry.record_event(experiment.model, kind, {"experiment": experiment.id, "revision": experiment.revision} | details)


def _check_shares(challengers: Mapping[str, str], shares: Mapping[str, float], shadows: Mapping[str, float]) -> None:
    if not challengers:
        raise ServingError("no version to compare with; name one with --challenger or --shadow")
    if unknown := (shares.keys() | shadows.keys()) - challengers.keys():
        raise ServingError(f"{', '.join(sorted(unknown))}: no version given for it; variants: {', '.join(challengers) or 'none'}")
    for variant in challengers:
        if variant not in shadows and not 0 < shares.get(variant, 0.0) < 1:
            raise ServingError(
                f"traffic {shares.get(variant, 0.0):g} of '{variant}': give a fraction between 0 and 1, such as 0.1 for 10 %"
            )
    if sum(shares.values()) >= 1:
        raise ServingError(f"the challengers' traffic adds up to {sum(shares.values()):g}; leave a share for the {CHAMPION}")


def _version(registry: Registry, name: str, reference: str, answering: Variant) -> ModelVersion:
    version = registry.resolve(f"{name}:{reference}" if reference.isdigit() else reference)
    if version.name != name:
        raise ServingError(f"'{reference}' is a version of '{version.name}', not of '{name}'")
    if version.version == answering.version:
        raise ServingError(f"version {version.version} of '{name}' is what is served already; name another one")
    return version


def _experiment_with_challengers(name: str) -> Experiment:
    experiment = endpoint.experiment(name)
    if not experiment.is_running or len(experiment.variants) == 1:
        raise ServingError(f"no experiment is running on '{name}'; start one with `eagleray ab start {name}`")
    return experiment


def _end(registry: Registry, experiment: Experiment, winner: str, kind: Literal["ab_promote", "ab_abort"], by: str | None) -> Experiment:
    figures = endpoint.report(experiment.model)
    ended = conclude(experiment, winner, "promoted" if kind == "ab_promote" else "aborted", datetime.now(UTC))
    endpoint.update_experiment(ended)
    if kind == "ab_promote":  # before the event, which says that all is done
        registry.set_alias(ended.model, CHAMPION, ended.variant(winner).version)
    record(registry, ended, kind, {"by": by, "winner": winner, "versions": _versions(ended), "report": figures})
    return ended


def _versions(experiment: Experiment) -> dict[str, int]:
    return {variant.name: variant.version for variant in experiment.variants}
