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
    "ab_start",
    "ab_status",
    "compare_models",
    "doctor",
    "export_model",
    "ingest",
    "job_logs",
    "job_status",
    "list_jobs",
    "list_models",
    "load_job",
    "promote_model",
    "quickstart",
    "serve",
    "serve_status",
    "show_data",
    "show_model",
    "stop_job",
    "submit",
    "train",
    "tune",
    "verify_data",
)


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        from eagleray import api

        return getattr(api, name)
    raise AttributeError(f"module 'eagleray' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*_VERBS, "__version__"]
