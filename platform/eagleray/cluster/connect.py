"""Start Ray on this machine or join a cluster, quietly, and leave nothing behind."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagleray.cluster.forkserver import forked_workers
from eagleray.cluster.haproxy import haproxy_variables
from eagleray.errors import ClusterError

CONNECT_TIMEOUT_S = 3.0

_ENVIRONMENT = {
    # Under `uv run` Ray would start every worker through uv again, and upload the working directory.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Reports of epochs shorter than this wait for it (Ray's default: 2 s); a quarter second costs nothing.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # After a node's death Train waits so long for room for the workers it had before it tries with fewer (default: 60 s).
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Requests go from replica to replica by gRPC rather than as tasks of Ray, which takes longer.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # Two messages of the raylet that are harmless and come with every small machine and every shutdown of Serve.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "ServeController|worker processes have been started",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}

IDLE_WORKER_S = 600
"""Ray ends idle worker processes after a second; on a small machine starting the next one costs several of all its cores'. Those
that decode for validation are idle for as long as an epoch's training takes."""


@dataclass(frozen=True)
class Connection:
    """The cluster in use; `log_dir` is where Ray writes its full logs on this machine ('' where unknown)."""

    address: str
    is_local: bool
    log_dir: str


@contextmanager
def connected(
    address: str | None = None, *, num_cpus: int | None = None, needs: tuple[str, ...] = (), serves_tls: bool = False
) -> Iterator[Connection]:
    """Be connected to Ray for the block; a connection that exists already is used and left alone.

    Args:
        address: `host:port` or `auto` to join a cluster; None starts Ray here, or, within a submitted
            job, joins the job's own cluster.
        num_cpus: logical CPUs of a cluster started here; by default the machine's cores.
        needs: libraries that the block will import: they are loaded while Ray starts, which is mostly waiting.
        serves_tls: whether an endpoint on a Ray started here is to speak HTTPS, which Ray Serve's HAProxy does not.

    Raises:
        ClusterError: nobody answers at `address`, the token is wrong, or versions differ.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        yield _connection(is_local=False)
        return
    quiet()
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        check_address(address)
    with ExitStack() as stack:
        try:
            with _loading(needs):
                if address is not None:
                    _join(address)
                else:
                    _use_token()  # so does Ray, which then makes one where there is none; what is started before it has to know
                    variables = {} if serves_tls else stack.enter_context(haproxy_variables())
                    os.environ.update(variables)
                    stack.callback(_unset, variables)  # what `forked_workers` found is there again when it ends
                    stack.enter_context(forked_workers())
                    _start(num_cpus)
                    _unset(variables)  # programs that are started from here have nothing to do with this Ray's HAProxy
            yield _connection(is_local=address is None)
        finally:
            ray.shutdown()


def _unset(variables: Mapping[str, str]) -> None:
    for name in variables:
        os.environ.pop(name, None)


@contextmanager
def _loading(libraries: tuple[str, ...]) -> Iterator[None]:
    """Import libraries beside the block, and wait for it at its end: imports of one library by two threads are best avoided."""
    thread = threading.Thread(target=lambda: [importlib.import_module(library) for library in libraries], daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _start(num_cpus: int | None) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=num_cpus or os.cpu_count(),
        include_dashboard=False,
        log_to_driver=is_debug(),
        logging_level=_level(),
        _system_config={"idle_worker_killing_time_threshold_ms": IDLE_WORKER_S * 1000},
    )
    if not is_debug():
        # It looks through all log files ten times a second, for drivers that print their lines; this one does not.
        ray._private.worker._global_node.kill_log_monitor(check_alive=False)


def _join(address: str) -> None:
    import ray

    in_job = "RAY_JOB_ID" in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    options: dict[str, Any] = {} if in_job else {"runtime_env": {"py_modules": [str(package_directory())]}}
    try:
        ray.init(address=address, log_to_driver=is_debug(), logging_level=_level(), **options)
    except ConnectionError as error:
        raise ClusterError(
            f"Ray at '{address}' could not be joined: {_one_line(error)}; check the address, and RAY_AUTH_TOKEN if the cluster asks for a token"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray at '{address}' could not be joined: {_one_line(error)}") from error


def check_address(address: str) -> None:
    """Raise ClusterError within seconds where nobody listens at `address`; Ray itself would try for 20 s."""
    if address == "auto":
        return
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        raise ClusterError(f"--address '{address}': expected host:port (such as 10.0.0.1:6379) or 'auto'")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"--address '{address}': nobody listens there ({error.strerror or error}); start a cluster with `ray start --head`, or leave --address out"
        ) from None


def prepare_environment() -> None:
    """Set what Ray reads from the environment when it is imported; what the user has set stays."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if "ray" in sys.modules:  # a script of the user's imported it before, and this was read then
        from ray._private import ray_constants

        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = ray_constants.env_bool("RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)
    if has_token():
        _use_token()


def _use_token() -> None:
    """Authenticate by token, unless the user has said how."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if "ray" in sys.modules:  # which reads this once, when it is imported
        from ray._raylet import Config  # type: ignore[attr-defined]

        Config.initialize("")


def package_directory() -> Path:
    """Return the folder of the eagleray package, to be shipped to workers that do not have it."""
    return Path(__file__).resolve().parent.parent


def is_debug() -> bool:
    return os.environ.get("EAGLERAY_DEBUG") == "1"


def quiet() -> None:
    """Keep the log lines of Ray and others off the terminal, unless `--debug` asks for them."""
    if is_debug():
        return
    warnings.filterwarnings("ignore", module=r"(ray|mlflow|optuna)\b.*")
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's failure is told in one line by the search


def _level() -> int:
    return logging.INFO if is_debug() else logging.ERROR


def has_token() -> bool:
    """Return whether a Ray token is set for this user."""
    return bool(os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")) or (Path.home() / ".ray" / "auth_token").exists()


def _connection(is_local: bool) -> Connection:
    import ray

    node = ray._private.worker._global_node
    log_dir = node.get_logs_dir_path() if node is not None else ""
    return Connection(ray.get_runtime_context().gcs_address, is_local, log_dir)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
