"""How trials stand to each other, those that were stopped among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from lora_search.report.values import number
from lora_search.results import Row

STANDING = (
    "Trials trained to the end stand before stopped ones, and of the stopped the one that went further stands before; "
    "among equals the better value decides"
)
"""A stopped trial's last value is that of a rung: it says nothing beside one of a trial's end."""


def standing(rows: Iterable[Row], metric: str, mode: Literal["min", "max"]) -> list[Row]:
    """Trials that were completed or stopped, best first, by successive halving's own order.

    Failed and running trials, and those without a value, have no place in it.
    """
    sign = 1 if mode == "min" else -1

    def place(row: Mapping[str, Any]) -> tuple[bool, int, float, int]:
        stopped = row["state"] == "stopped"
        return stopped, -row["steps"] if stopped else 0, sign * row[metric], row["trial"]

    ended = [row for row in rows if row["state"] in ("completed", "stopped") and number(row.get(metric)) is not None]
    return sorted(ended, key=place)


def leaders(standing: Sequence[Row]) -> list[Row]:
    """The best tenth, three at least, of trials that were trained to the end."""
    completed = [row for row in standing if row["state"] == "completed"]
    return completed[: max(3, len(completed) // 10)]
