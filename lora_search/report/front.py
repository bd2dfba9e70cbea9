"""Quality against what a trial costs: the trials that none beats in both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from lora_search.report.values import number
from lora_search.results import Row


def front(rows: Iterable[Row], cost: str, metric: str, mode: Literal["min", "max"]) -> list[int]:
    """The Pareto front, cheapest first: trials for which no other is at least as good, and as cheap, and better in one.

    Every adapter that exists counts as it is, stopped or not.
    """
    sign = 1 if mode == "min" else -1
    points = sorted(
        (spent, sign * value, row["trial"])
        for row in rows
        if row["state"] in ("completed", "stopped")
        and (spent := number(row.get(cost))) is not None
        and (value := number(row.get(metric))) is not None
    )
    found: list[int] = []
    reached = float("inf")
    for _, value, trial in points:
        if value < reached:
            found.append(trial)
            reached = value
    return found
