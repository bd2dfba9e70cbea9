"""What the scheduler stopped, where, and what that saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lora_search.report.values import count, duration, number, percent
from lora_search.results import Row


def savings(rows: Sequence[Row]) -> dict[str, Any]:
    """Steps done and spared over the trials that have ended, and how many trials ended at which step.

    The time spared is each stopped trial's own seconds a step, times the steps it did not take.

    Returns:
        stopped, ended, done, spared (optimiser steps), seconds (trial-seconds spared), rungs (each with step, went_on,
        stopped).
    """
    ended = [row for row in rows if row["state"] in ("completed", "stopped")]
    stopped = [row for row in ended if row["state"] == "stopped"]
    done = sum(row["steps"] for row in ended)
    spared, seconds = 0, 0.0
    for row in stopped:
        left = max(0, (row.get("steps_total") or row["steps"]) - row["steps"])
        spared += left
        if row["steps"]:
            seconds += left * (number(row.get("seconds")) or 0.0) / row["steps"]
    steps = sorted({row["steps"] for row in stopped})
    rungs = [
        {
            "step": step,
            "went_on": sum(row["steps"] > step for row in rows),
            "stopped": sum(row["steps"] == step for row in stopped),
        }
        for step in steps
    ]
    return {
        "stopped": len(stopped),
        "ended": len(ended),
        "done": done,
        "spared": spared,
        "seconds": seconds,
        "rungs": rungs,
    }


def savings_finding(found: Mapping[str, Any], scheduler: str) -> str:
    """The caption: `ASHA stopped 11 of 24 trials ...`."""
    name = scheduler.upper() if scheduler != "none" else "No scheduler"
    if not found["ended"]:
        return "No trial has ended yet."
    if not found["stopped"]:
        return f"{name} stopped none of {count(found['ended'], 'trial')}."
    share = found["spared"] / max(1, found["spared"] + found["done"])
    return (
        f"{name} stopped {found['stopped']} of {count(found['ended'], 'trial')} that have ended and saved "
        f"{percent(share)} of their steps ({found['spared']:,} of {found['spared'] + found['done']:,}), about "
        f"{duration(found['seconds'])} of training."
    )


def early_places(
    curves: Mapping[int, Sequence[tuple[int, float]]], steps: Sequence[int], trial: int, mode: Literal["min", "max"]
) -> list[tuple[int, int, int]]:
    """Where a trial stood at each step that it shares with others: step, place from 1, of how many."""
    sign = 1 if mode == "min" else -1
    places = []
    for step in steps:
        values = {number: dict(curve).get(step) for number, curve in curves.items()}
        own = values.get(trial)
        others = [value for value in values.values() if value is not None]
        if own is not None and len(others) > 1:
            places.append((step, 1 + sum(sign * value < sign * own for value in others), len(others)))
    return places
