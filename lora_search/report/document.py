"""A run as the document that its page draws: plain values, JSON all through."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import lora_search
from lora_search.report.advice import advice
from lora_search.report.compare import compared_steps, usual_step
from lora_search.report.front import front
from lora_search.report.headline import METRICS, commands, headline, tested
from lora_search.report.importance import importance, importance_finding
from lora_search.report.occupancy import capacities, occupancy, occupancy_finding, stays
from lora_search.report.parameters import LABELS, Parameter, parameters, shown_names
from lora_search.report.progress import curves, progress, progress_finding, thinned
from lora_search.report.savings import early_places, savings, savings_finding
from lora_search.report.standing import STANDING, standing
from lora_search.report.values import count, listed, number, plain, text
from lora_search.results import Row, Run, best_row
from lora_search.rundir import is_locked
from lora_search.space import planned_trials, rungs

COSTS = ("trainable_parameters", "trial_memory_bytes")


def document(run: Run, *, finished: bool | None = None) -> dict[str, Any]:
    """All that the page shows.

    Args:
        finished: whether the sweep has come to its end; None looks.

    Raises:
        InputError, SweepError: a file of the run directory is not what it should be.
    """
    spec, rows, events = run.spec, run.rows, run.events
    metric, mode = run.metric, run.mode
    label, unit = METRICS[metric]
    found = tested(run.provenance.get("conclusion"))
    state = _state(run, finished, found is not None)
    best = best_row(rows, metric, spec.search.mode)
    placed = standing(rows, metric, spec.search.mode)
    searched = parameters(spec, rows)
    lines = curves(events, metric)
    steps = compared_steps(rows, lines, rungs(spec))
    reached = {step for step, _ in steps}
    planned = planned_trials(spec)
    way = progress(events, metric, spec.search.mode)
    saved = savings(rows)
    now = events[-1]["time"] if events and state == "running" else None  # this machine's clock may differ
    places = occupancy(stays(events, now), capacities(run.hosts))
    weights = importance(placed, searched)
    fronts = {cost: front(rows, cost, metric, spec.search.mode) for cost in COSTS}
    names = shown_names(spec)
    found_document = {
        "name": run.name,
        "state": state,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": lora_search.__version__,
        "metric": {"name": metric, "label": label, "unit": unit, "mode": mode},
        "planned": planned,
        "counts": Counter(row["state"] for row in rows),
        "headline": headline(run, rows, best, found, state),
        "tested": found.to_dict() if found else None,
        "best": _best(run, best),
        "advice": advice(spec, placed, lines, planned),
        "parameters": [parameter.to_dict() for parameter in searched],
        "fixed": _fixed(names, searched, rows),
        "columns": [{"name": name, "label": LABELS.get(name, name)} for name in names],
        "trials": [_trial(row, metric, names) for row in rows],
        "standing": [row["trial"] for row in placed],
        "curves": {str(trial): thinned(curve) for trial, curve in lines.items()},
        "compared": {
            "steps": [{"step": step, "trials": trials} for step, trials in steps],
            "usual": usual_step(steps, len(lines)),
            "values": {
                str(trial): {str(step): value for step, value in curve if step in reached}
                for trial, curve in lines.items()
            },
        },
        "progress": way,
        "importance": weights,
        "savings": saved,
        "occupancy": places,
        "fronts": fronts,
        "findings": {
            "progress": progress_finding(way, label),
            "curves": _curves_finding(run, rows, lines, best),
            "parallel": "Drag along an axis to keep the trials that pass there; the table below keeps the same.",
            "importance": importance_finding(weights, len(placed)),
            "slices": _slices_finding(steps, lines, searched),
            "front": _front_finding(fronts, rows),
            "savings": savings_finding(saved, spec.search.scheduler.name),
            "early": _early_finding(lines, [step for step, _ in steps], best, run),
            "occupancy": occupancy_finding(places),
            "standing": STANDING,
        },
        "provenance": {
            "run": run.directory.place,
            **run.provenance,
            "report": {"written by": f"lora-search {lora_search.__version__}", "python": platform.python_version()},
        },
        "sweep": spec.model_dump(mode="json"),
    }
    cleaned: dict[str, Any] = plain(found_document)
    return cleaned


def _state(run: Run, finished: bool | None, concluded: bool) -> str:
    if finished or (finished is None and concluded):
        return "finished"
    return "running" if is_locked(run.directory) else "interrupted"


def _trial(row: Row, metric: str, names: Sequence[str]) -> dict[str, Any]:
    """A row as the page needs it; parameters as text beside their numbers."""
    kept = "trial state steps steps_total trainable_parameters trial_memory_bytes tokens seconds host reason".split()
    return {
        **{name: row.get(name) for name in kept},
        "value": number(row.get(metric)),
        "parameters": {
            name: value if number(value := row.get(name)) is not None else None if value is None else text(value)
            for name in names
        },
    }


def _best(run: Run, best: Row | None) -> dict[str, Any] | None:
    if best is None:
        return None
    names = shown_names(run.spec)
    settings = [[LABELS.get(name, name.replace("_", " ")), text(best[name])] for name in names if name in best]
    settings += [["steps", text(best["steps"])], ["trainable parameters", f"{best.get('trainable_parameters') or 0:,}"]]
    return {
        "trial": best["trial"],
        "value": best[run.metric],
        "state": best["state"],
        "settings": settings,
        "commands": commands(run, best),
    }


def _fixed(names: Sequence[str], searched: Sequence[Parameter], rows: Sequence[Row]) -> list[list[str]]:
    """Parameters of which all trials have the same value."""
    varied = {parameter.name for parameter in searched}
    return [[LABELS.get(n, n), text(rows[0][n])] for n in names if rows and n not in varied and n in rows[0]]


def _curves_finding(
    run: Run, rows: Sequence[Row], lines: Mapping[int, Sequence[tuple[int, float]]], best: Row | None
) -> str:
    if not lines:
        return "No trial has reported yet."
    states = Counter(row["state"] for row in rows)
    parts = [f"{states[state]} {state}" for state in ("completed", "stopped", "failed", "running") if states[state]]
    ends = [row[run.metric] for row in rows if row["state"] == "completed" and number(row.get(run.metric)) is not None]
    spread = (
        f" Among those that were trained to the end, values lie from {min(ends):.4g} to {max(ends):.4g}."
        if ends
        else ""
    )
    return f"{count(len(rows), 'trial')}: {', '.join(parts)}.{spread}"


def _slices_finding(steps: Sequence[tuple[int, int]], lines: Mapping[int, Any], searched: Sequence[Parameter]) -> str:
    if not searched or not steps:
        return "There is nothing to compare yet: trials have to differ, and two of them to report at the same step."
    return (
        "All trials in a panel are compared at the same step, so that a stopped trial stands beside what the others "
        f"had reached by then; of {len(lines)} trials, {steps[0][1]} reached step {steps[0][0]} and {steps[-1][1]} "
        f"step {steps[-1][0]}."
    )


def _front_finding(fronts: Mapping[str, Sequence[int]], rows: Sequence[Row]) -> str:
    trials = fronts["trainable_parameters"]
    if not trials:
        return "No trial has come to a result yet."
    sizes = {row["trial"]: row.get("trainable_parameters") for row in rows}
    named = [f"{trial} ({sizes[trial]:,})" for trial in trials[:6]]
    more = f" and {len(trials) - 6} more" if len(trials) > 6 else ""
    return (
        f"No other trial is better than these with as few trainable parameters: {listed(named)}{more}. Every adapter "
        "counts as it is, stopped or not. Memory is what the trial adds to its host by the plan: adapter, gradient, "
        "optimiser state, and the activations of a pass over its longest rows."
    )


def _early_finding(
    lines: Mapping[int, Sequence[tuple[int, float]]], steps: Sequence[int], best: Row | None, run: Run
) -> str:
    places = early_places(lines, steps, best["trial"], run.spec.search.mode) if best else []
    if not places or not best:
        return ""
    told = [f"place {place} of {among} at step {step}" for step, place, among in places]
    return f"The best trial, {best['trial']}, had {listed(told)}."
