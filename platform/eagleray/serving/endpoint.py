"""From the driver: bring versions up behind the endpoint, and change what it serves.

Each version is a Ray Serve application of its own, without an address; one more, the ingress, is the endpoint. A
change brings up what is new, then hands the ingress its new state through `user_config` (no replica restarts), then
takes down what nobody is sent to any more. That is why no request fails.
"""

from __future__ import annotations

import hashlib
import logging
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import ApplicationStatus, LoggingConfig

from eagleray import storage
from eagleray.artifacts.package import load_card
from eagleray.config.schema import REQUEST_TIMEOUT_S, AutoscaledReplicas, ServingConfig
from eagleray.errors import EagleRayError, ServingError
from eagleray.placement import on_group
from eagleray.ports import check_port_free
from eagleray.serving import app as ingress
from eagleray.serving import autoscaling, deployment
from eagleray.serving.access import list_keys
from eagleray.serving.backends import REFERENCE, BackendChoice, choose_for_package
from eagleray.serving.experiment import Experiment
from eagleray.serving.router import WATCHER_APPLICATION, ModelSpec, RouterState
from eagleray.serving.rpc import SERVICERS
from eagleray.serving.upstream import BackendSpec

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

INGRESS_APPLICATION = "eagleray"
START_TIMEOUT_S = 180.0
UPSCALE_DELAY_S = 5.0
"""Time of more load before a replica is added."""
LOOK_BACK_S = 11.0
"""Time over which load is averaged (Ray Serve's default: 30 s, in which a rise is seen late); longer than the 10 s between reports of it."""
LONGEST_LOOK_S = 0.03
"""Time between looks for a replica with room while requests wait (Ray Serve's default: up to 0.5 s, in which a replica that has done
its few requests has nothing to do: the more ask, the fewer are answered)."""
_INGRESS_CPUS = 0.1
_CLASSIFIER_CPUS = 0.2
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


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
        RegistryError: a version's package is missing, damaged, or not signed by whom `config` trusts.
        ServingError: the port is taken, the certificate cannot be used, keys that are in force are not named, or a version
            does not come up.
    """
    missing = [v.name for v in experiment.variants if v.name not in versions and experiment.winner in (None, v.name)]
    if missing:
        raise ServingError(f"'{model}': no version given for the variants {', '.join(missing)}")
    address = _start_serve(config)
    state = _state()
    state.experiments_uri = storage.normalize_uri(experiments_uri)
    state.keys_uri = _keys_uri(state, config)
    state.models[model] = ModelSpec(experiment=experiment, backends=_backends(versions, config), config=config)
    _apply(state)
    _wait_until_ready(address)
    return address


def _keys_uri(state: RouterState, config: ServingConfig) -> str | None:
    """Return the keys of the endpoint from now on; they are never dropped just because a deployment does not name them."""
    if config.keys_uri is not None:
        list_keys(config.keys_uri)  # a folder that cannot be read is known before anything changes
    elif state.keys_uri is not None and not config.allow_anonymous:
        raise ServingError(
            f"serve.keys_uri is not set, but the endpoint asks for API keys from '{state.keys_uri}'; set serve.keys_uri to that, "
            "or serve.allow_anonymous: true to let everybody in"
        )
    return config.keys_uri


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
                "backend": backend.choice and backend.choice.backend,
                "speed_up": backend.choice and backend.choice.speed_up,
                "measured": [row.model_dump() for row in backend.choice.measured] if backend.choice else [],
            }
            for variant, backend in spec.backends.items()
        }
        models[name] = {"experiment": spec.experiment.id, "status": spec.experiment.status, "variants": variants}
    return {"address": _address(), "models": models}


def models() -> list[str]:
    """Return the names of the models that are served; none where no endpoint runs."""
    return list(_state().models) if _is_running() else []


def experiment(model: str) -> Experiment:
    """Return the experiment on `model`, running or ended. Raises ServingError where it is not served."""
    return _model(_running_state(), model).experiment


def update_experiment(changed: Experiment, versions: Mapping[str, Version] | None = None) -> None:
    """Put a changed experiment, or the next one, into force; variants that it no longer needs are taken down.

    Args:
        versions: by variant, those that are not up yet.

    Raises:
        ServingError: its model is not served, a variant has no version up, or somebody else changed it in the meantime.
    """
    state = _running_state()
    spec = _model(state, changed.model)
    current = spec.experiment
    if current.id == changed.id and not (current.is_running and changed.revision - current.revision in (0, 1)):
        raise ServingError(f"the experiment on '{changed.model}' was changed by somebody else in this moment; look at it again")
    needed = changed.variants if changed.is_running else (changed.answering,)
    up = {backend.version: backend for backend in spec.backends.values()}
    new = {variant.name: versions[variant.name] for variant in needed if versions and variant.version not in up}
    if missing := [variant.name for variant in needed if variant.version not in up and variant.name not in new]:
        raise ServingError(f"'{changed.model}': the variants {', '.join(sorted(missing))} have no version up; deploy them first")
    backends = {variant.name: up[variant.version] for variant in needed if variant.version in up} | _backends(new, spec.config)
    state.models[changed.model] = spec.model_copy(update={"experiment": changed, "backends": backends})
    _apply(state)


def report(model: str) -> dict[str, Any]:
    """Return the figures of the experiment on `model`; see `report.experiment_report`. Raises ServingError."""
    _model(_running_state(), model)
    return cast("dict[str, Any]", _ingress().report.remote(model).result())


def shutdown() -> None:
    """Take the endpoint down, after its log is written, and Ray Serve with it unless somebody else uses it."""
    if not ray.is_initialized() or not _is_serve_up():
        return
    # A version that was taken down a moment ago is nobody else's.
    running = {name for name, application in serve.status().applications.items() if application.status != ApplicationStatus.DELETING}
    ours = {WATCHER_APPLICATION, INGRESS_APPLICATION, *_applications(_state())}
    if ours.issuperset(running):
        serve.shutdown()
    else:
        for name in sorted(ours & running, key=lambda name: (name != WATCHER_APPLICATION, name != INGRESS_APPLICATION)):
            serve.delete(name)


# --- Ray Serve --------------------------------------------------------------------------------------------------


def _start_serve(config: ServingConfig) -> str:
    """Start Ray Serve on the configured port, unless it runs there; return the address."""
    if not _is_serve_up():
        check_port_free(config.host, config.port)
        _check_certificate(config)
        http_options = {
            "host": config.host,
            "port": config.port,
            # The ingress ends requests before, with a reason; this is for those that never come to an end there.
            "request_timeout_s": REQUEST_TIMEOUT_S + 5.0,
            "ssl_keyfile": config.tls_key_path,
            "ssl_certfile": config.tls_cert_path,
        }
        grpc_options = None
        if config.grpc_port is not None:
            check_port_free("127.0.0.1", config.grpc_port)
            grpc_options = {"port": config.grpc_port, "grpc_servicer_functions": SERVICERS, "request_timeout_s": REQUEST_TIMEOUT_S + 5.0}
        if config.tls_cert_path is not None:
            _check_no_haproxy()
        serve.start(http_options=http_options, grpc_options=grpc_options, logging_config=QUIET)
        return _address()
    options = _serve_client().http_config
    if options.port != config.port:
        raise ServingError(
            f"serve.port {config.port}: Ray Serve already runs on this cluster with port {options.port}; "
            f"set serve.port to {options.port}, or end what is served there"
        )
    if options.ssl_certfile != config.tls_cert_path:
        raise ServingError(
            f"serve.tls_cert_path {config.tls_cert_path}: Ray Serve already runs on this cluster with {options.ssl_certfile}; "
            "set it to that, or end what is served there"
        )
    return _address()


def _check_certificate(config: ServingConfig) -> None:
    if config.tls_cert_path is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert_path, config.tls_key_path)
    except OSError as error:  # ssl.SSLError among them
        raise ServingError(
            f"serve.tls_cert_path {config.tls_cert_path}, serve.tls_key_path {config.tls_key_path}: cannot be used ({error}); "
            "give a certificate and its key, as PEM files"
        ) from None


def _check_no_haproxy() -> None:
    """Raise ServingError where requests would go through HAProxy, to which Ray Serve gives no certificate."""
    on_node = ray.remote(num_cpus=0)(os.getenv)
    if ray.get(on_node.remote("RAY_SERVE_ENABLE_HA_PROXY")) == "1":
        raise ServingError(
            "serve.tls_cert_path: the nodes of this cluster were started with RAY_SERVE_ENABLE_HA_PROXY=1, and Ray Serve's HAProxy has no HTTPS; "
            "start them without it, or let a load balancer in front of the endpoint speak HTTPS"
        )


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
    scheme = "https" if options.ssl_certfile else "http"
    return f"{scheme}://{ray.util.get_node_ip_address() if is_any else options.host}:{options.port}"


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


def _backends(versions: Mapping[str, Version], config: ServingConfig) -> dict[str, BackendSpec]:
    backends = {}
    for variant, version in versions.items():
        card = load_card(version.package_uri, config.trusted_keys)
        backends[variant] = BackendSpec(
            version=version.version,
            application=f"{version.name}-v{version.version}",
            package_uri=version.package_uri,
            weights_sha256=card.weights_sha256,
            network=f"{card.model.model_dump_json(exclude={'pretrained'})} {card.preprocessing.image_size} {len(card.classes)}",
            image_size=card.preprocessing.image_size,
            classes=card.classes,
        )
    return backends


def _apply(state: RouterState) -> None:
    """Bring up the state's versions, hand the ingress the state, take down what only the state before named."""
    before, needed = _applications(_state()), _applications(state)
    total = sum(config.max_replicas for _, config in needed.values())
    for name, (spec, config) in needed.items():
        spec.choice = _known_choice(spec, config, before.get(name)) or _choose(
            spec, config, total, _choice_of_like(spec, config, needed, before)
        )
    classifiers = [serve.RunTarget(_classifier(b, config, total), name, None, QUIET) for name, (b, config) in needed.items()]
    ingress_target = serve.RunTarget(_ingress_application(state), INGRESS_APPLICATION, "/", QUIET)
    # Only an ingress that has users must not hear of a version before it is up.
    for targets in [classifiers, [ingress_target]] if _is_running() else [[*classifiers, ingress_target]]:
        run(targets)
    if gone := set(before) - set(needed):
        with suppress(ray.exceptions.RayError):  # an ingress that has just died has no requests any more
            _ingress().drain.remote().result()
        for name in gone:
            serve.delete(name, _blocking=False)


def _known_choice(spec: BackendSpec, config: ServingConfig, before: tuple[BackendSpec, ServingConfig] | None) -> BackendChoice | None:
    """Return what computes a version that is up already, unless it is to be chosen by something else from now on."""
    if before is None:
        return spec.choice
    up, its = before
    return up.choice if spec.weights_sha256 == up.weights_sha256 and _terms(config) == _terms(its) else None


def _choice_of_like(
    spec: BackendSpec, config: ServingConfig, *states: dict[str, tuple[BackendSpec, ServingConfig]]
) -> BackendChoice | None:
    """Return what computes other weights of the same network, chosen on the same terms; None: there are none."""
    known = (other for state in states for other in state.values())
    return next((up.choice for up, its in known if up.choice and up.network == spec.network and _terms(config) == _terms(its)), None)


def _terms(config: ServingConfig) -> tuple[Any, ...]:
    """Return by what a back end is chosen."""
    return config.backend, config.backend_tolerance, config.int8_agreement, config.max_batch_size


def _choose(spec: BackendSpec, config: ServingConfig, num_replicas: int, like: BackendChoice | None) -> BackendChoice:
    """Measure on a node of the cluster what computes a version best; the reference needs none."""
    if config.backend == REFERENCE:
        return BackendChoice(backend=REFERENCE)
    # Its process ends with it, rather than being kept, with all that the back ends have loaded, for whoever comes next.
    measure = ray.remote(max_calls=1, **actor_options(_CLASSIFIER_CPUS))(choose_for_package)
    try:
        choice: BackendChoice = ray.get(measure.remote(spec.package_uri, config, num_replicas, like), timeout=START_TIMEOUT_S)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, EagleRayError) else error from None
    except ray.exceptions.GetTimeoutError:
        raise ServingError(
            f"'{spec.application}': no back end was chosen within {START_TIMEOUT_S:.0f} s; the cluster may lack free CPUs "
            f"({_CLASSIFIER_CPUS} for each replica), or set serve.backend to one by name"
        ) from None
    return choice


def _applications(state: RouterState) -> dict[str, tuple[BackendSpec, ServingConfig]]:
    """Return the Ray Serve applications behind the ingress; a version that two variants share is one."""
    return {backend.application: (backend, spec.config) for spec in state.models.values() for backend in spec.backends.values()}


def _classifier(backend: BackendSpec, config: ServingConfig, num_replicas: int) -> serve.Application:
    options: dict[str, Any] = {
        **_number_of_replicas(config),
        "ray_actor_options": actor_options(_CLASSIFIER_CPUS),
        # One batch runs while the next one gathers; what is beyond both waits in the bounded queue.
        "max_ongoing_requests": 2 * config.max_batch_size,
        "max_queued_requests": config.max_queued_requests,
        "request_router_config": RequestRouterConfig(max_backoff_s=LONGEST_LOOK_S),
        "user_config": config.model_dump(mode="json"),
    }
    assert backend.choice is not None
    computed_by = backend.choice.backend
    classifier = deployment_of(deployment.Replica, options, f"{backend.package_uri} {computed_by}")
    return classifier.bind(backend.package_uri, num_replicas, computed_by, config.trusted_keys)


def actor_options(cpus: float) -> dict[str, Any]:
    """Return Ray's options for what serves: on the nodes that are for it, where the cluster has such nodes."""
    where = on_group("serve")
    return {"num_cpus": cpus} | ({"label_selector": where} if where else {})


def _number_of_replicas(config: ServingConfig) -> dict[str, Any]:
    replicas = config.num_replicas
    if not isinstance(replicas, AutoscaledReplicas):
        return {"num_replicas": replicas}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.min,
            "initial_replicas": max(1, replicas.min),  # a version that cannot come up is known at once
            "max_replicas": replicas.max,
            # As soon as requests wait for more than the next batch, one more replica would take them.
            "target_ongoing_requests": config.max_batch_size,
            "look_back_period_s": LOOK_BACK_S,
            "upscale_delay_s": UPSCALE_DELAY_S,
            "downscale_delay_s": replicas.idle_s,
            "policy": {"policy_function": autoscaling.POLICY},
        }
    }


def _ingress_application(state: RouterState) -> serve.Application:
    waiting = sum(
        spec.config.max_replicas * 2 * spec.config.max_batch_size + spec.config.max_queued_requests
        for spec in state.models.values()
        for _ in spec.backends
    )
    options: dict[str, Any] = {
        "ray_actor_options": actor_options(_INGRESS_CPUS),
        # Enough for the queues behind it to fill up and refuse by themselves.
        "max_ongoing_requests": waiting + 256,
        "max_queued_requests": 256,
        "backpressure_config": {"retry_after_s": 1},
        "user_config": state.model_dump(mode="json"),
    }
    return deployment_of(ingress.Ingress, options, "").bind()


def deployment_of(base: serve.Deployment, options: dict[str, Any], identity: str) -> serve.Deployment:
    """Return the deployment with our options; replicas are replaced where our code or `identity` changes, else left alone."""
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


def run(targets: list[serve.RunTarget]) -> None:
    """Deploy applications and return when they run; those that were not there before are removed if one fails. Raises ServingError."""
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
    # Whether clients trust the certificate is theirs to say; nothing secret is sent here.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{address}/v2/health/ready", timeout=5, context=context):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise ServingError(f"{address} does not answer ({error}); is a firewall or a proxy in between?") from None
        time.sleep(0.05)
