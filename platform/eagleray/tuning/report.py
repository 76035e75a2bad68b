"""A search to look at afterwards: one HTML page that needs no network, and its figures as PNGs."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from eagleray import storage
from eagleray.artifacts.runs import load_run_job
from eagleray.errors import SearchError
from eagleray.tuning.search import METRIC, TRIALS_NAME, TrialResult
from eagleray.tuning.study import open_studies, study_url

if TYPE_CHECKING:
    import plotly.graph_objects as go

PAGE_NAME = "report.html"
STATUS_COLOURS = {"finished": "#2a7", "stopped": "#89a", "failed": "#c44", "running": "#47c"}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem } th, td { text-align: left; padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums } .quiet { color: #666 }
"""


def write_report(runs_uri: str, run_name: str, directory: Path) -> Path:
    """Write the report of a search, running or ended, and return its page.

    Args:
        directory: gets `report.html` and a PNG of each figure.

    Raises:
        TrainingError: there is no such run.
        SearchError: it is not a search, or has not begun a trial.
    """
    job, run_uri = load_run_job(runs_uri, run_name), storage.join(runs_uri, run_name)
    trials_uri = storage.join(run_uri, TRIALS_NAME)
    if job.tune is None or not storage.exists(trials_uri):
        raise SearchError(f"'{run_uri}': no trials there (no {TRIALS_NAME}); give the name that `eagleray tune` printed")
    trials = [TrialResult(**row) for row in json.loads(storage.read_bytes(trials_uri))]
    study = optuna.load_study(study_name=run_name, storage=open_studies(study_url(job, run_name)))
    directory.mkdir(parents=True, exist_ok=True)
    objectives, plots = job.tune.objectives, optuna.visualization
    first, target = objectives[0], _first_value if len(objectives) > 1 else None
    figures: dict[str, Callable[[], go.Figure]] = {
        "Best so far": lambda: plots.plot_optimization_history(study, target=target, target_name=first),
        "Learning curves": lambda: _curves(first, trials),
        "What mattered": lambda: plots.plot_param_importances(study, target=target, target_name=first),
        "Parallel coordinates": lambda: plots.plot_parallel_coordinate(study, target=target, target_name=first),
        "What was spent": lambda: _spent(trials),
    }
    if target is not None:
        figures["Pareto front"] = lambda: plots.plot_pareto_front(study, target_names=objectives)
    parts = [f"<h1>Search {html.escape(run_name)}</h1>", _summary(trials), *_drawn(figures), "<h2>Trials</h2>", _table(trials)]
    page = directory / PAGE_NAME
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(run_name)}</title><style>{_STYLE}</style>'
    page.write_text(f"{head}<body>{''.join(parts)}</body></html>", encoding="utf-8")
    _write_pngs(study, first, target, trials, directory)
    return page


def _first_value(trial: optuna.trial.FrozenTrial) -> float:
    return float(trial.values[0])


def _summary(trials: list[TrialResult]) -> str:
    counts = {status: sum(trial.status == status for trial in trials) for status in STATUS_COLOURS}
    seconds = sum(trial.seconds for trial in trials)
    wasted = sum(trial.seconds for trial in trials if trial.status in ("stopped", "failed"))
    told = [f"{count} {status}" for status, count in counts.items() if count]
    best = max(trials, key=lambda trial: trial.val_top1, default=None)
    usd = sum(trial.usd for trial in trials)
    lines = [f"{len(trials)} trials: {', '.join(told)}; {seconds:,.0f} s of trials, {wasted:,.0f} s of them on stopped and failed ones."]
    if best is not None and math.isfinite(best.val_top1):
        values = ", ".join(f"{key} = {value}" for key, value in best.values.items())
        if usd:
            first = next(trial.val_top1 for trial in trials if math.isfinite(trial.val_top1))
            gained = 100 * (best.val_top1 - first)
            per_point = f"; {usd / gained:,.2f} USD for each of the {gained:.2f} points gained over the first trial" if gained else ""
            lines.append(f"Cost: {usd:,.2f} USD{per_point}.")
        lines.append(f"Best: trial {best.trial_id}, {100 * best.val_top1:.2f} % {METRIC}, with {values}.")
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _drawn(figures: dict[str, Callable[[], go.Figure]]) -> Iterator[str]:
    """Yield each figure under its title; one that these trials are too few for says so."""
    library: bool | str = "inline"
    for title, draw in figures.items():
        yield f"<h2>{title}</h2>"
        try:
            figure = draw()
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            yield f'<p class="quiet">Not to be drawn yet: {html.escape(str(error) or type(error).__name__)}</p>'
            continue
        figure.update_layout(title=None, template="plotly_white", margin={"t": 20})
        yield figure.to_html(full_html=False, include_plotlyjs=library, config={"responsive": True})
        library = False


def _curves(objective: str, trials: list[TrialResult]) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for trial in trials:
        figure.add_scatter(
            x=list(range(1, len(trial.curve) + 1)),
            y=trial.curve,
            name=f"{trial.trial_id} {trial.family}",
            mode="lines+markers",
            line={"color": STATUS_COLOURS[trial.status]},
        )
    return figure.update_layout(xaxis_title="epoch", yaxis_title=objective, showlegend=False)


def _spent(trials: list[TrialResult]) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    families = sorted({trial.family for trial in trials})
    for status, colour in STATUS_COLOURS.items():
        seconds = [sum(t.seconds for t in trials if (t.family, t.status) == (family, status)) for family in families]
        figure.add_bar(x=families, y=seconds, name=status, marker={"color": colour})
    return figure.update_layout(barmode="stack", yaxis_title="seconds of trials")


def _table(trials: list[TrialResult]) -> str:
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("trial", METRIC, "status", "epochs", "seconds", "USD", *keys, "reason"))
    rows = []
    for trial in sorted(trials, key=lambda trial: -trial.val_top1):
        best = f"{100 * trial.val_top1:.2f} %" if math.isfinite(trial.val_top1) else ""
        usd = f"{trial.usd:.2f}" if trial.usd else ""
        numbers = "".join(f'<td class="number">{text}</td>' for text in (best, trial.status, trial.epochs, f"{trial.seconds:.1f}", usd))
        values = "".join(f"<td>{html.escape(str(trial.values.get(key, '')))}</td>" for key in keys)
        rows.append(f"<tr><td>{trial.trial_id}</td>{numbers}{values}<td>{html.escape(trial.reason)}</td></tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _write_pngs(study: optuna.Study, first: str, target: Callable[..., float] | None, trials: list[TrialResult], directory: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as drawn

    def curves() -> None:
        _, axes = plt.subplots()
        for trial in trials:
            axes.plot(range(1, len(trial.curve) + 1), trial.curve, color=STATUS_COLOURS[trial.status], marker=".")
        axes.set(xlabel="epoch", ylabel=first)

    figures: dict[str, Callable[[], Any]] = {
        "history": lambda: drawn.plot_optimization_history(study, target=target, target_name=first),
        "importances": lambda: drawn.plot_param_importances(study, target=target, target_name=first),
        "parallel_coordinates": lambda: drawn.plot_parallel_coordinate(study, target=target, target_name=first),
        "learning_curves": curves,
    }
    for name, draw in figures.items():
        try:
            draw()
            plt.savefig(directory / f"{name}.png", dpi=120, bbox_inches="tight")
        except (ValueError, RuntimeError, ZeroDivisionError):
            continue  # the page says why
        finally:
            plt.close("all")
