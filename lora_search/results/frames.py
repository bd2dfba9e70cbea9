"""Results as pandas frames, whose columns, dtypes and units `COLUMNS` documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_search.results.events import FIGURES, Event
from lora_search.results.rows import Row
from lora_search.spec.schema import Training

if TYPE_CHECKING:
    import pandas as pd

Dtype = Literal["Int64", "float64", "boolean", "string", "datetime64[us, UTC]"]
"""Of pandas: Int64 and boolean know a missing value, NA; float64 has NaN for it."""

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""How text begins that a spreadsheet would run (https://owasp.org/www-community/attacks/CSV_Injection)."""


@dataclass(frozen=True)
class Column:
    """What a column of a frame holds."""

    dtype: Dtype
    unit: str
    meaning: str


COLUMNS: Mapping[str, Column] = {
    "run": Column("string", "", "name of the run directory; in frames of several runs"),
    "trial": Column("Int64", "", "number of the trial in its run, from 0"),
    "state": Column("string", "", "running, completed, stopped (by the scheduler) or failed"),
    "step": Column("Int64", "optimiser steps", "of this report"),
    "steps": Column("Int64", "optimiser steps", "done by the last report"),
    "steps_total": Column("Int64", "optimiser steps", "that the trial has if nothing stops it, searched or not"),
    "eval_loss": Column("float64", "nats a target token", "over the validation split"),
    "perplexity": Column("float64", "", "exp(eval_loss)"),
    "token_accuracy": Column("float64", "share", "validation target tokens that are the most likely one"),
    "train_loss": Column("float64", "nats a target token", "mean over the steps since the report before"),
    "grad_norm": Column("float64", "", "mean L2 norm of the gradient before clipping since the report before"),
    "lr": Column("float64", "", "learning rate of the last step, by the schedule"),
    "trainable_parameters": Column("Int64", "numbers", "of the adapter"),
    "tokens": Column("Int64", "tokens", "trained on so far, padding not counted"),
    "tokens_per_second": Column("float64", "tokens a second", "of the trial's own time since the report before"),
    "seconds": Column("float64", "seconds", "the trial's own training and evaluation time so far"),
    "peak_memory_bytes": Column("Int64", "bytes", "the most that the trial's host has held"),
    "trial_memory_bytes": Column("Int64", "bytes", "of the trial by itself, by the plan: state and activations"),
    "host": Column("string", "", "that trained the trial last"),
    "reason": Column("string", "", "why the trial failed"),
    "started": Column("datetime64[us, UTC]", "", "when the trial began"),
    "ended": Column("datetime64[us, UTC]", "", "when the trial ended"),
    "time": Column("datetime64[us, UTC]", "", "when the report was made"),
    "model": Column("string", "", "the base; in frames of several runs"),
    "experiment": Column("string", "", "name of a published experiment"),
    "accuracy": Column("float64", "share", "validation problems solved; of published experiments"),
    "test_accuracy": Column("float64", "share", "test problems solved; of published experiments"),
    "rank": Column("Int64", "", "r of LoRA"),
    "alpha": Column("float64", "", "numerator of the scaling"),
    "alpha_ratio": Column("float64", "", "alpha / rank"),
    "dropout": Column("float64", "share", "of the adapter's input"),
    "target_modules": Column("string", "", "target set or pattern; names of a list with commas between them"),
    "use_rslora": Column("boolean", "", "scaled by alpha / sqrt(rank)"),
    **{
        name: Column(
            "Int64" if field.annotation is int else "float64" if field.annotation is float else "string",
            "",
            field.description or name.replace("_", " "),
        )
        for name, field in Training.model_fields.items()
        if name != "steps"
    },
}
"""The columns that we know; whatever else a run names stands beside them, with the dtype of its values."""


def rows_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as they are, one a trial for those of `trial_rows`; columns by `COLUMNS`."""
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["trial", "state", "steps"]
    return _frame({name: [row.get(name) for row in rows] for name in names})


def reports_frame(events: Iterable[Event]) -> pd.DataFrame:
    """One row a report, in the order in which they were made; columns by `COLUMNS`."""
    reports = [event for event in events if event["event"] == "report"]
    return _frame({name: [report.get(name) for report in reports] for name in ("trial", "step", "time", *FIGURES)})


def _frame(values: Mapping[str, list[Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({name: _series(name, column) for name, column in values.items()})


def _series(name: str, values: list[Any]) -> pd.Series[Any]:
    """A column with its documented dtype, or, where a value is of another, as text."""
    import pandas as pd

    known = COLUMNS.get(name)
    dtype = known.dtype if known else _dtype_of(values)
    if dtype == "string":
        return pd.Series([_text(value) for value in values], dtype="string")
    if dtype == "datetime64[us, UTC]":
        milliseconds = (pd.Series(values, dtype="float64") * 1000).round()  # as precise as they are recorded
        return pd.to_datetime(milliseconds, unit="ms", utc=True).astype(dtype)
    try:
        return pd.Series(values, dtype=dtype)
    except (TypeError, ValueError):  # somebody else's run
        return pd.Series([_text(value) for value in values], dtype="string")


def _dtype_of(values: list[Any]) -> Dtype:
    kinds = {type(value) for value in values if value is not None}
    if kinds and kinds <= {int, float}:
        return "Int64" if kinds == {int} else "float64"
    return "boolean" if kinds == {bool} else "string"


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return ", ".join(value) if isinstance(value, list) else json.dumps(value)


def render(rows: list[Row], form: Literal["csv", "json"], *, ascii_only: bool = False) -> str:
    """Rows as text: JSON is a list of objects, what is not ASCII spelled out in it where that is asked for.

    In CSV, text that a spreadsheet would take for a formula has a `'` before it.
    """
    if form == "json":
        return json.dumps(rows, indent=2, ensure_ascii=ascii_only) + "\n"
    plain = [{_no_formula(name): _no_formula(value) for name, value in row.items()} for row in rows]
    text = rows_frame(plain).to_csv(index=False, lineterminator="\r\n")
    # Python before 3.11.9 quotes a lone \r, at which readers begin a row, only where rows end with it (cpython#67044).
    return re.sub(r'("(?:[^"]|"")*")|\r\n', lambda found: found[1] or "\n", text)


def _no_formula(value: Any) -> Any:
    """A value for a cell; a number stays one."""
    text = _text(value) if isinstance(value, list) else value
    return f"'{text}" if isinstance(text, str) and text.startswith(FORMULA) else value
