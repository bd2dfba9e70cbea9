"""How the best value came down while time passed and compute was spent; and each trial's curve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from lora_search.report.values import number, percent
from lora_search.results.events import Event

MOST_REPORTS = 2000
"""Reports drawn behind the line of the best; more are thinned out evenly, improvements stay."""

MOST_POINTS = 60
"""Points of one trial's curve, first and last among them."""

SPENT = ("tokens", "steps", "trial_seconds")


def progress(events: Iterable[Event], metric: str, mode: Literal["min", "max"]) -> dict[str, Any]:
    """Every report with what had been spent by then, and whether it was the best yet.

    What a trial repeats after a loss is spent twice.

    Returns:
        `reports`: lists of [seconds since the first event, tokens, optimiser steps and trial-seconds of all trials so
        far, value, trial]; `best`: the same, for each report that was better than all before it.
    """
    sign = 1 if mode == "min" else -1
    spent = dict.fromkeys(SPENT, 0.0)
    last: dict[int, dict[str, float]] = {}
    at_step: dict[int, dict[int, dict[str, float]]] = {}
    reports: list[list[Any]] = []
    best: list[list[Any]] = []
    began: float | None = None
    for event in events:
        began = event["time"] if began is None else began
        trial = event["trial"]
        if event["event"] == "resume":
            last[trial] = at_step.get(trial, {}).get(event.get("step", 0), dict.fromkeys(SPENT, 0.0))
        if event["event"] != "report":
            continue
        now = _figures(event)
        before = last.get(trial, {})
        for name in SPENT:
            spent[name] += max(0.0, now[name] - before.get(name, 0.0))
        last[trial] = now
        at_step.setdefault(trial, {})[event["step"]] = now
        value = number(event.get(metric))
        if value is not None:
            point = [round(event["time"] - began, 1), *(round(spent[name], 1) for name in SPENT), value, trial]
            reports.append(point)
            if not best or sign * value < sign * best[-1][4]:
                best.append(point)
    stride = -(-len(reports) // MOST_REPORTS) or 1
    end = [round(event["time"] - began, 1), *(round(spent[name], 1) for name in SPENT)] if began is not None else []
    return {"reports": reports[::stride], "best": best, "end": end, "count": len(reports)}


def _figures(report: Mapping[str, Any]) -> dict[str, float]:
    return {
        "tokens": number(report.get("tokens")) or 0.0,
        "steps": float(report["step"]),
        "trial_seconds": number(report.get("seconds")) or 0.0,
    }


def curves(events: Iterable[Event], metric: str) -> dict[int, list[tuple[int, float]]]:
    """Each trial's values by step, ascending; the last report of a step counts."""
    found: dict[int, dict[int, float]] = {}
    for event in events:
        if event["event"] == "report" and (value := number(event.get(metric))) is not None:
            found.setdefault(event["trial"], {})[event["step"]] = value
    return {trial: sorted(values.items()) for trial, values in found.items()}


def thinned(curve: Sequence[tuple[int, float]]) -> list[list[float]]:
    """A curve of no more than MOST_POINTS, evenly taken, its ends kept."""
    if len(curve) <= MOST_POINTS:
        return [list(point) for point in curve]
    last = len(curve) - 1
    return [list(curve[round(i * last / (MOST_POINTS - 1))]) for i in range(MOST_POINTS)]


def progress_finding(found: Mapping[str, Any], label: str) -> str:
    """The caption: when most of the way was made."""
    best = found["best"]
    if len(best) < 2:
        return "There are too few reports yet to see progress."
    first, last = best[0][4], best[-1][4]
    most = next(point for point in best if abs(point[4] - first) >= 0.9 * abs(last - first))
    share = most[1] / found["end"][1] if found["end"][1] else 1.0
    return (
        f"The best {label} went from {first:.4g} to {last:.4g}; nine tenths of that was reached after "
        f"{percent(share)} of the tokens. The last improvement was by trial {best[-1][5]}."
    )
