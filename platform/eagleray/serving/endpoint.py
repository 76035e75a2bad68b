"""From the driver: bring versions up behind the endpoint, change what it serves, run experiments on it.

Each version is a Ray Serve application of its own, without an address; one more, the ingress, is the endpoint. A
change brings up what is new, then hands the ingress its new state through `user_config` (no replica restarts), then
takes down what nobody is sent to any more. That is why no request fails.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, LoggingConfig

from eagleray import storage
from eagleray.artifacts.package import load_card
from eagleray.config.schema import ServingConfig
from eagleray.errors import ServingError
from eagleray.ports import check_port_free
from eagleray.serving import app as ingress
from eagleray.serving import deployment
from eagleray.serving.experiment import Experiment, Variant, conclude, with_weights
from eagleray.serving.router import BackendSpec, ModelSpec, RouterState

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from eagleray.artifacts.registry import Registry

INGRESS_APPLICATION = "eagleray"
CHAMPION = "champion"
CHALLENGER = "challenger"
START_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 60.0
"""A request that has no answer by then is ended with 408."""

_INGRESS_CPUS = 0.1
_CLASSIFIER_CPUS = 0.2
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


class Version(Protocol):
    """What is needed of a registered version (`artifacts.registry.ModelVersion`)."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def package_uri(self) -> str: ...


# --- Endpoint ---------------------------------------------------------------------------------------------------


def deploy(model: str, versions: Mapping[str, Version], experiment: Experiment, config: ServingConfig, experiments_uri: str) -> str:
    """Serve `versions` (by variant) as `model`, split as `experiment` says; return the endpoint's address.

    Other models on the endpoint stay. Needs a Ray that is connected to (`ray.init`).

    Raises:
        RegistryError: a version's package is missing or damaged.
        ServingError: the port is taken, or a version does not come up.
    """
    missing = [v.name for v in experiment.variants if v.name not in versions and experiment.winner in (None, v.name)]
    if missing:
        raise ServingError(f"'{model}': no version given for the variants {', '.join(missing)}")
    address = _start_serve(config)
    state = _state()
    state.experiments_uri = storage.normalize_uri(experiments_uri)
    state.models[model] = ModelSpec(experiment=experiment, backends=_backends(versions), config=config)
    _apply(state)
    _wait_until_ready(address)
    return address


def status() -> dict[str, Any]:
    """Return what the endpoint serves: its address, and per model its experiment and versions with their state.

    Raises:
        ServingError: no endpoint runs on this cluster.
    """
    state = _running_state()
    applications = serve.status().applications
    models = {}
    for name, spec in state.models.items():
        variants = {
            variant: {
                "version": backend.version,
                "state": str(applications[backend.application].status.value) if backend.application in applications else "GONE",
                "traffic": _traffic(spec.experiment, variant),
            }
            for variant, backend in spec.backends.items()
        }
        models[name] = {"experiment": spec.experiment.id, "status": spec.experiment.status, "variants": variants}
    return {"address": _address(), "models": models}


def update_experiment(experiment: Experiment) -> None:
    """Put a changed experiment into force; variants that it no longer sends anybody to are taken down.

    Raises:
        ServingError: its model is not served, or a variant has no version up.
    """
    state = _running_state()
    spec = _model(state, experiment.model)
    keep = {v.name for v in experiment.variants} if experiment.is_running else {cast(str, experiment.winner)}
    if missing := keep - set(spec.backends):
        raise ServingError(f"'{experiment.model}': the variants {', '.join(sorted(missing))} have no version up; deploy them first")
    backends = {name: backend for name, backend in spec.backends.items() if name in keep}
    state.models[experiment.model] = spec.model_copy(update={"experiment": experiment, "backends": backends})
    _apply(state)


def report(model: str) -> dict[str, Any]:
    """Return the figures of the experiment on `model`; see `report.experiment_report`. Raises ServingError."""
    _model(_running_state(), model)
    return cast("dict[str, Any]", _ingress().report.remote(model).result())


def shutdown() -> None:
    """Take the endpoint down, after its log is written, and Ray Serve with it unless somebody else uses it."""
    if not ray.is_initialized() or not _is_serve_up():
        return
    ours = {INGRESS_APPLICATION, *_applications(_state())}
    if ours.issuperset(serve.status().applications):
        serve.shutdown()
    else:
        for name in (INGRESS_APPLICATION, *sorted(ours - {INGRESS_APPLICATION})):
            serve.delete(name)


def new_experiment(model: str, variants: Iterable[Variant]) -> Experiment:
    """Return a running experiment that starts now; the first variant is the control."""
    now = datetime.now(UTC)
    name = f"{model}-{now:%Y%m%dt%H%M%S}-{secrets.token_hex(2)}"
    return Experiment(id=name, model=model, salt=secrets.token_hex(16), variants=tuple(variants), started=now, revised=now)


def ab_start(registry: Registry, name: str, challenger: str, traffic_fraction: float) -> Experiment:
    """Send `traffic_fraction` of the users of `name`, which is served, to another version.

    Args:
        challenger: a reference (`imagenet:7`, `imagenet@challenger`) or a version number.

    Raises:
        RegistryError: no such version.
        ServingError: `name` is not served, an experiment is running on it, or the version is the one that is served.
    """
    if not 0 < traffic_fraction < 1:
        raise ServingError(f"traffic {traffic_fraction}: give a fraction between 0 and 1, such as 0.1 for 10 %")
    state = _running_state()
    spec = _model(state, name)
    if spec.experiment.is_running and len(spec.experiment.variants) > 1:
        raise ServingError(f"an experiment is already running on '{name}'; promote or abort it first")
    served = next(iter(spec.backends.values()))
    version = registry.resolve(f"{name}:{challenger}" if challenger.isdigit() else challenger)
    if version.name != name:
        raise ServingError(f"'{challenger}' is a version of '{version.name}', not of '{name}'")
    if version.version == served.version:
        raise ServingError(f"version {version.version} of '{name}' is what is served already; name another one")
    experiment = new_experiment(
        name,
        [
            Variant(name=CHAMPION, version=served.version, weight=1 - traffic_fraction),
            Variant(name=CHALLENGER, version=version.version, weight=traffic_fraction),
        ],
    )
    backends = {CHAMPION: served} | _backends({CHALLENGER: version})
    state.models[name] = spec.model_copy(update={"experiment": experiment, "backends": backends})
    _apply(state)
    _record(registry, experiment, "ab_start", {"weights": experiment.shares, "versions": _versions(experiment)})
    return experiment


def ab_status(registry: Registry, name: str) -> dict[str, Any]:
    """Return the figures of the running experiment, or those with which the last one ended.

    Raises:
        ServingError: there has been no experiment on `name`.
    """
    if _is_running() and name in _state().models:
        return report(name)
    ended = [event for event in registry.events(name) if "report" in event]
    if not ended:
        raise ServingError(f"no experiment has been run on '{name}'; start one with `eagleray ab start {name}`")
    return cast("dict[str, Any]", ended[-1]["report"])


def ab_set_weights(registry: Registry, name: str, weights: Mapping[str, float]) -> Experiment:
    """Change the split; as few users as possible change their variant. Figures start anew. Raises ServingError."""
    experiment = _model(_running_state(), name).experiment
    figures = report(name)
    changed = with_weights(experiment, weights, datetime.now(UTC))
    update_experiment(changed)
    _record(registry, changed, "ab_weights", {"weights": changed.shares, "report": figures})
    return changed


def ab_promote(registry: Registry, name: str, variant: str | None = None) -> Experiment:
    """End the experiment: `variant` (by default the only challenger) becomes `champion` and gets all traffic.

    Raises:
        ServingError: no experiment is running, or it is not clear which variant is meant.
    """
    experiment = _experiment_with_challengers(name)
    challengers = [v.name for v in experiment.variants[1:]]
    if variant is None and len(challengers) > 1:
        raise ServingError(f"'{name}' has the challengers {', '.join(challengers)}; say which one to promote")
    winner = experiment.variant(variant or challengers[0])
    ended = _end(registry, experiment, winner.name, "ab_promote")
    registry.set_alias(name, CHAMPION, winner.version)
    return ended


def ab_abort(registry: Registry, name: str) -> Experiment:
    """End the experiment: all traffic returns to the control. Raises ServingError."""
    experiment = _experiment_with_challengers(name)
    return _end(registry, experiment, experiment.control.name, "ab_abort")


def _experiment_with_challengers(name: str) -> Experiment:
    experiment = _model(_running_state(), name).experiment
    if not experiment.is_running or len(experiment.variants) == 1:
        raise ServingError(f"no experiment is running on '{name}'; start one with `eagleray ab start {name}`")
    return experiment


def _end(registry: Registry, experiment: Experiment, winner: str, kind: str) -> Experiment:
    figures = report(experiment.model)
    ended = conclude(experiment, winner, "promoted" if kind == "ab_promote" else "aborted", datetime.now(UTC))
    update_experiment(ended)
    _record(registry, ended, kind, {"winner": winner, "versions": _versions(ended), "report": figures})
    return ended


def _record(registry: Registry, experiment: Experiment, kind: str, details: dict[str, Any]) -> None:
    registry.save_experiment(experiment.model, experiment.model_dump(mode="json") if experiment.is_running else None)
    registry.record_event(experiment.model, kind, {"experiment": experiment.id} | details)


def _versions(experiment: Experiment) -> dict[str, int]:
    return {variant.name: variant.version for variant in experiment.variants}


# --- Ray Serve --------------------------------------------------------------------------------------------------


def _start_serve(config: ServingConfig) -> str:
    """Start Ray Serve on the configured port, unless it runs there; return the address."""
    if not _is_serve_up():
        check_port_free(config.host, config.port)
        http_options = {"host": config.host, "port": config.port, "request_timeout_s": REQUEST_TIMEOUT_S}
        serve.start(http_options=http_options, logging_config=_QUIET)
        return _address()
    options = _serve_client().http_config
    if options.port != config.port:
        raise ServingError(
            f"serve.port {config.port}: Ray Serve already runs on this cluster with port {options.port}; "
            f"set serve.port to {options.port}, or end what is served there"
        )
    return _address()


def _serve_client() -> Any:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # Ray Serve has no public way to ask for the HTTP options in force.
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def _is_serve_up() -> bool:
    return _serve_client() is not None


def _is_running() -> bool:
    return _is_serve_up() and INGRESS_APPLICATION in serve.status().applications


def _address() -> str:
    options = _serve_client().http_config
    is_any = options.host in ("0.0.0.0", "::")
    return f"http://{ray.util.get_node_ip_address() if is_any else options.host}:{options.port}"


def _ingress() -> DeploymentHandle[Any]:
    return serve.get_deployment_handle(ingress.NAME, app_name=INGRESS_APPLICATION)


def _state() -> RouterState:
    """Return what the ingress serves now; nothing where it does not run."""
    if not _is_running():
        return RouterState()
    return RouterState.model_validate(_ingress().state.remote().result())


def _running_state() -> RouterState:
    if not _is_running():
        raise ServingError("no endpoint runs on this Ray cluster; start one with `eagleray serve deploy`")
    return _state()


def _model(state: RouterState, name: str) -> ModelSpec:
    if name not in state.models:
        raise ServingError(f"'{name}' is not served; served: {', '.join(state.models) or 'none'}")
    return state.models[name]


def _traffic(experiment: Experiment, variant: str) -> float:
    return experiment.shares[variant] if experiment.winner is None else float(variant == experiment.winner)


def _backends(versions: Mapping[str, Version]) -> dict[str, BackendSpec]:
    backends = {}
    for variant, version in versions.items():
        card = load_card(version.package_uri)
        backends[variant] = BackendSpec(
            version=version.version,
            application=f"{version.name}-v{version.version}",
            package_uri=version.package_uri,
            weights_sha256=card.weights_sha256,
            image_size=card.preprocessing.image_size,
            classes=card.classes,
        )
    return backends


def _apply(state: RouterState) -> None:
    """Bring up the state's versions, hand the ingress the state, take down what only the state before named."""
    before, needed = _applications(_state()), _applications(state)
    total = sum(config.num_replicas for _, config in needed.values())
    classifiers = [serve.RunTarget(_classifier(b, config, total), name, None, _QUIET) for name, (b, config) in needed.items()]
    ingress_target = serve.RunTarget(_ingress_application(state), INGRESS_APPLICATION, "/", _QUIET)
    # Only an ingress that has users must not hear of a version before it is up.
    for targets in [classifiers, [ingress_target]] if _is_running() else [[*classifiers, ingress_target]]:
        _run(targets)
    for name in set(before) - set(needed):
        serve.delete(name, _blocking=False)


def _applications(state: RouterState) -> dict[str, tuple[BackendSpec, ServingConfig]]:
    """Return the Ray Serve applications behind the ingress; a version that two variants share is one."""
    return {backend.application: (backend, spec.config) for spec in state.models.values() for backend in spec.backends.values()}


def _classifier(backend: BackendSpec, config: ServingConfig, num_replicas: int) -> serve.Application:
    options: dict[str, Any] = {
        "num_replicas": config.num_replicas,
        "ray_actor_options": {"num_cpus": _CLASSIFIER_CPUS},
        # One batch runs while the next one gathers; what is beyond both waits in the bounded queue.
        "max_ongoing_requests": 2 * config.max_batch_size,
        "max_queued_requests": config.max_queued_requests,
        "user_config": config.model_dump(mode="json"),
    }
    return _deployment(deployment.Classifier, options, backend.package_uri).bind(backend.package_uri, num_replicas)


def _ingress_application(state: RouterState) -> serve.Application:
    waiting = sum(
        spec.config.num_replicas * 2 * spec.config.max_batch_size + spec.config.max_queued_requests
        for spec in state.models.values()
        for _ in spec.backends
    )
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": _INGRESS_CPUS},
        # Enough for the queues behind it to fill up and refuse by themselves.
        "max_ongoing_requests": waiting + 256,
        "max_queued_requests": 256,
        "backpressure_config": {"retry_after_s": 1},
        "user_config": state.model_dump(mode="json"),
    }
    return _deployment(ingress.Ingress, options, "").bind()


def _deployment(base: serve.Deployment, options: dict[str, Any], identity: str) -> serve.Deployment:
    # Ray Serve restarts the replicas at every `serve.run` unless the code version is the same; it has no public
    # name for that outside of its config files.
    code_version = hashlib.sha256(f"{_code_digest()}{identity}".encode()).hexdigest()[:16]
    return base.options(
        version=code_version,
        _internal=True,
        max_constructor_retry_count=2,
        max_surge_percent=100,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
        **options,
    )


def _code_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _run(targets: list[serve.RunTarget]) -> None:
    """Deploy applications and return when they run; those that were not there before are removed if one fails."""
    before = set(serve.status().applications)
    names = [target.name for target in targets]
    try:
        serve.run_many(targets, wait_for_applications_running=False)
        _wait_until_running(names)
    except ServingError:
        for name in set(names) - before:
            serve.delete(name, _blocking=False)
        raise


def _wait_until_running(names: list[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        applications = serve.status().applications
        for name in names:
            if applications[name].status == ApplicationStatus.DEPLOY_FAILED:
                raise ServingError(f"'{name}' does not come up: {_last_line(applications[name])}; its log is under {_log_dir()}")
        if all(applications[name].status == ApplicationStatus.RUNNING for name in names):
            return
        if time.monotonic() > deadline:
            waiting = ", ".join(name for name in names if applications[name].status != ApplicationStatus.RUNNING)
            raise ServingError(
                f"{waiting}: not up after {START_TIMEOUT_S:.0f} s; the cluster may lack free CPUs "
                f"({_CLASSIFIER_CPUS} for each replica); its log is under {_log_dir()}"
            )
        time.sleep(0.1)


def _last_line(application: Any) -> str:
    messages = [application.message, *(d.message for d in application.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def _log_dir() -> str:
    return f"{ray._private.worker._global_node.get_logs_dir_path()}/serve" if ray._private.worker._global_node else "Ray's log folder"


def _wait_until_ready(address: str) -> None:
    """Return when the endpoint answers over HTTP: the proxy learns of its route a little after the replicas are up."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{address}/v2/health/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise ServingError(f"{address} does not answer ({error}); is a firewall or a proxy in between?") from None
        time.sleep(0.05)
