"""An experiment's log as figures: shares, errors, latency, outcomes and what they prove."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from eagleray.serving.experiment import Experiment, compare, sample_ratio_p_value

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE_RATIO_ALPHA = 0.001
"""Below this p-value the split is called broken."""


def experiment_report(experiment: Experiment, assignments: pa.Table, outcomes: pa.Table) -> dict[str, Any]:
    """Summarise what happened under the current weights (revision), as plain JSON values.

    `share` and the sample-ratio check count distinct routing keys, for those are what is split; one user may send many
    requests. Each outcome counts as an independent trial: where users send several each, those of one user
    resemble each other and the interval is narrower than it should be.

    Args:
        assignments: columns of `outcomes.assignments_schema`, one row per request.
        outcomes: columns of `outcomes.outcomes_schema`, one row per request.
    """
    # The other arms share alpha, so that none of the comparisons raises a false alarm with more than alpha (Bonferroni).
    alpha = experiment.alpha / max(1, len(experiment.variants) - 1)
    assignments, outcomes = _of_revision(assignments, experiment.revision), _of_revision(outcomes, experiment.revision)
    variants = {name: _variant_figures(name, assignments, outcomes) for name in experiment.shares}
    keys = {name: figures["keys"] for name, figures in variants.items()}
    all_keys = sum(keys.values())
    for variant in experiment.variants:
        figures = variants[variant.name]
        figures |= {"version": variant.version, "weight": variant.weight, "expected_share": experiment.shares[variant.name]}
        figures["share"] = keys[variant.name] / all_keys if all_keys else None
    p_value = sample_ratio_p_value(list(keys.values()), list(experiment.shares.values()))
    control = variants[experiment.control.name]
    differences = {
        variant.name: asdict(_compare(control, variants[variant.name], alpha)) | {"alpha": alpha} for variant in experiment.variants[1:]
    }
    return {
        "model": experiment.model,
        "experiment": experiment.id,
        "status": experiment.status,
        "winner": experiment.winner,
        "started": experiment.started.isoformat(),
        "revision": experiment.revision,
        "revised": experiment.revised.isoformat(),
        "control": experiment.control.name,
        "variants": variants,
        "differences": differences,
        "sample_ratio": {"p_value": p_value, "is_mismatch": p_value < SAMPLE_RATIO_ALPHA},
    }


def _of_revision(table: pa.Table, revision: int) -> pa.Table:
    import pyarrow.compute as pc

    return table.filter(pc.field("revision") == revision)


def _variant_figures(name: str, assignments: pa.Table, outcomes: pa.Table) -> dict[str, Any]:
    import pyarrow.compute as pc

    mine = assignments.filter(pc.field("variant") == name)
    errors = int(pc.sum(mine["is_error"]).as_py() or 0)
    latency_ms = mine.filter(~pc.field("is_error"))["latency_ms"].to_numpy()
    judged = outcomes.filter(pc.field("variant") == name)
    successes = int(pc.sum(judged["outcome"]).as_py() or 0)
    return {
        "requests": mine.num_rows,
        "keys": int(pc.count_distinct(mine["key_hash"]).as_py()),
        "errors": errors,
        "p50_ms": _percentile(latency_ms, 50),
        "p99_ms": _percentile(latency_ms, 99),
        "outcomes": judged.num_rows,
        "successes": successes,
        "success_rate": successes / judged.num_rows if judged.num_rows else None,
    }


def _percentile(values: np.ndarray, percent: float) -> float | None:
    return None if values.size == 0 else math.floor(float(np.percentile(values, percent)) * 100 + 0.5) / 100


def _compare(control: dict[str, Any], variant: dict[str, Any], alpha: float) -> Any:
    return compare((control["successes"], control["outcomes"]), (variant["successes"], variant["outcomes"]), alpha)
