"""Results of a run, read from its trials.jsonl: one row a trial. Never imports Ray, nor torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_search.errors import SweepError
from lora_search.rundir import RunDirectory

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]

METRICS = (
    "eval_loss",
    "perplexity",
    "token_accuracy",
    "train_loss",
    "grad_norm",
    "trainable_parameters",
    "tokens",
    "tokens_per_second",
    "seconds",
    "peak_memory_bytes",
    "host",
)
"""What a row takes from its trial's last report."""


def read_events(file: Path) -> Iterator[Row]:
    """The lines of a trials.jsonl; a last line that was cut off while it was written is left out.

    Raises:
        SweepError: a line before the last is no JSON.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise SweepError(f"{file}:{number}: not JSON: {error}") from None


def trial_rows(events: Iterable[Row]) -> list[Row]:
    """One row a trial, in the order of their numbers, from its events.

    A row has trial, state (running, completed, stopped, failed), steps, the parameters by their own names, the last
    report's figures, and the reason of a failure. A figure not known yet is None.
    """
    rows: dict[int, Row] = {}
    for event in events:
        trial = event["trial"]
        row = rows.setdefault(trial, {"trial": trial, "state": "running", "steps": 0})
        if event["event"] == "start":
            rows[trial] = row | event["parameters"] | dict.fromkeys(METRICS) | {"reason": None}
        elif event["event"] == "report":
            row.update({"steps": event["step"]} | {key: event.get(key) for key in METRICS})
        elif event["event"] == "end":
            row.update(state=event["state"], reason=event["reason"])
    return [rows[trial] for trial in sorted(rows)]


def run_rows(run: RunDirectory) -> list[Row]:
    """The rows of a run directory."""
    return trial_rows(read_events(run.trials))


def best_row(rows: Iterable[Mapping[str, Any]], metric: str, mode: Literal["min", "max"]) -> Row | None:
    """The row whose last report is best, among completed and stopped trials; None where there is none."""
    ended = [row for row in rows if row["state"] in ("completed", "stopped") and row.get(metric) is not None]
    if not ended:
        return None
    sign = 1 if mode == "min" else -1
    return dict(min(ended, key=lambda row: (sign * row[metric], row["trial"])))


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a table."""
    import pandas as pd

    return pd.DataFrame(list(rows))


def render(rows: list[Row], form: Literal["csv", "json"]) -> str:
    """Rows as text: JSON is a list of objects."""
    if form == "json":
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    return str(frame(rows).to_csv(index=False))
