"""eagleray: from raw pictures to a served, A/B-tested image classifier on one Ray cluster.

The verbs of the command line are functions here (`eagleray.ingest`, `train`, `tune`, …). They are
loaded when first used, so that `import eagleray` costs nothing.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_VERBS = (
    "ab_abort",
    "ab_promote",
    "ab_set_weights",
    "ab_start",
    "ab_status",
    "add_key",
    "cluster_costs",
    "cluster_status",
    "compare_models",
    "decrypt_package",
    "doctor",
    "estimate_cost",
    "export_model",
    "ingest",
    "job_logs",
    "job_status",
    "list_jobs",
    "list_keys",
    "list_models",
    "list_runs",
    "load_job",
    "promote_model",
    "quickstart",
    "register_winner",
    "render_cluster",
    "resubmit",
    "revoke_key",
    "serve",
    "serve_status",
    "serve_stop",
    "show_data",
    "show_model",
    "show_run",
    "stop_job",
    "submit",
    "train",
    "tune",
    "verify_data",
    "verify_model",
    "versions_by_job",
)


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        from eagleray import api

        return getattr(api, name)
    raise AttributeError(f"module 'eagleray' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*_VERBS, "__version__"]
