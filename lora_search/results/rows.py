"""One row a trial, as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lora_search.results.events import FIGURES, Event, read_events
from lora_search.rundir import RunDirectory

Row = dict[str, Any]


PLANNED = "steps_total"
"""What a row calls the steps that a trial has if nothing stops it: its `steps` are those done."""


def column(parameter: str) -> str:
    """What a row calls a parameter: its own name, but PLANNED for `steps`."""
    return PLANNED if parameter == "steps" else parameter


def sampled(row: Mapping[str, Any], parameters: Iterable[str]) -> dict[str, Any]:
    """A trial's values of some parameters, by their own names; without those that its row does not tell."""
    return {name: row[column(name)] for name in parameters if row.get(column(name)) is not None}


def trial_rows(events: Iterable[Event]) -> list[Row]:
    """One row a trial, in the order of their numbers, from its events.

    A row has trial, state (running, completed, stopped, failed), steps, the parameters by their own names, the last
    report's figures, the reason of a failure, and when it started and ended, in seconds since 1970. What is not known
    yet is None. Searched `steps` are `steps_total`, as `column` says.
    """
    rows: dict[int, Row] = {}
    last: dict[int, Event] = {}
    for event in events:
        trial = event["trial"]
        if event["event"] == "start":
            row = rows.setdefault(trial, {"trial": trial, "state": "running", "steps": 0})
            late = dict.fromkeys(FIGURES) | {PLANNED: _count(event["parameters"].get("steps"))}
            late |= {"reason": None, "started": event["time"], "ended": None}
            rows[trial] = row | event["parameters"] | late | row
        elif trial not in rows:
            continue
        elif event["event"] == "report":
            last[trial] = event
        elif event["event"] == "end":
            rows[trial].update(state=event["state"], reason=event["reason"], ended=event["time"])
    for trial, report in last.items():
        planned = {PLANNED: report.get(PLANNED) or rows[trial][PLANNED]}
        rows[trial].update({"steps": report["step"]} | {key: report.get(key) for key in FIGURES} | planned)
    return [rows[trial] for trial in sorted(rows)]


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63 else None


def run_rows(run: RunDirectory) -> list[Row]:
    """The rows of a run directory."""
    return trial_rows(read_events(run.trials))


def ended_count(rows: Iterable[Mapping[str, Any]]) -> int:
    """How many of the trials have come to an end, of whatever kind."""
    return sum(row["state"] != "running" for row in rows)


def ranked_rows(
    rows: Iterable[Mapping[str, Any]], metric: str, mode: Literal["min", "max"], *, running: bool = False
) -> list[Row]:
    """The completed and stopped trials' rows, and with `running` those that train, the best last report first."""
    states = ("completed", "stopped", "running") if running else ("completed", "stopped")
    found = [dict(row) for row in rows if row["state"] in states and row.get(metric) is not None]
    sign = 1 if mode == "min" else -1
    return sorted(found, key=lambda row: (sign * row[metric], row["trial"]))


def best_row(rows: Iterable[Mapping[str, Any]], metric: str, mode: Literal["min", "max"]) -> Row | None:
    """The row whose last report is best, among completed and stopped trials; None where there is none."""
    return next(iter(ranked_rows(rows, metric, mode)), None)


def ahead_row(rows: Iterable[Mapping[str, Any]], metric: str, mode: Literal["min", "max"]) -> Row | None:
    """The row of a trial not at its end whose last report is better than that of every one that is; None without."""
    leading = next(iter(ranked_rows(rows, metric, mode, running=True)), None)
    return leading if leading and leading["state"] == "running" else None
