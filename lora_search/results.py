"""Results of a run, read from its trials.jsonl: one row a trial. Never imports Ray, nor torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lora_search.errors import SweepError
from lora_search.rundir import RunDirectory
from lora_search.spec.schema import plain_reason

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


Count = Annotated[int, Field(ge=0)]


class _Event(BaseModel):
    """What is asked of every line; a run directory may be somebody else's."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    event: str
    trial: Annotated[int, Field(ge=0, lt=2**31)]
    time: float


class _Start(_Event):
    parameters: dict[str, str | int | float | bool | list[str] | None]


class _Report(_Event):
    step: Count
    eval_loss: float | None = None
    perplexity: float | None = None
    token_accuracy: float | None = None
    train_loss: float | None = None
    grad_norm: float | None = None
    trainable_parameters: Count | None = None
    tokens: Count | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    peak_memory_bytes: Count | None = None
    host: str | None = None


def _inside(path: str) -> str:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError("leads out of the run directory")
    return path


class _Checkpoint(_Event):
    step: Count
    path: Annotated[str, AfterValidator(_inside)]


class _Resume(_Event):
    step: Count
    damaged: list[str]


class _End(_Event):
    state: Literal["completed", "stopped", "failed"]
    reason: str | None


KINDS: dict[str, TypeAdapter[Any]] = {
    "start": TypeAdapter(_Start),
    "report": TypeAdapter(_Report),
    "checkpoint": TypeAdapter(_Checkpoint),
    "resume": TypeAdapter(_Resume),
    "end": TypeAdapter(_End),
}
ANY: TypeAdapter[Any] = TypeAdapter(_Event)


def read_events(file: Path) -> Iterator[Row]:
    """The lines of a trials.jsonl; a last line that was cut off while it was written is left out.

    NaN and infinity, which are no JSON, are None.

    Raises:
        SweepError: a line before the last is no JSON, or a line is no event.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except UnicodeDecodeError as error:
        raise SweepError(f"{file}: not UTF-8: {error}") from None
    lines = text.removesuffix("\n").split("\n") if text else []  # splitlines() splits within strings too
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line, parse_constant=lambda _: None, parse_int=_bounded)
            json.dumps(event, ensure_ascii=False).encode() if "\\ud" in line.lower() else None
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return
            raise SweepError(f"{file}:{number}: not JSON: {error}") from None
        kind = event.get("event") if isinstance(event, dict) else None
        try:
            (KINDS.get(kind, ANY) if isinstance(kind, str) else ANY).validate_python(event)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise SweepError(
                f"{file}:{number}: {key + ': ' if key else ''}found {repr(first['input'])[:80]}; "
                f"{plain_reason(first['msg'])}"
            ) from None
        yield event


def _bounded(digits: str) -> int:
    """An integer of 64 bits; Parquet and pandas know no others."""
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"{digits[:20]}... is no integer of 64 bits")
    return int(digits)


def trial_rows(events: Iterable[Row]) -> list[Row]:
    """One row a trial, in the order of their numbers, from its events.

    A row has trial, state (running, completed, stopped, failed), steps, the parameters by their own names, the last
    report's figures, and the reason of a failure. A figure not known yet is None.
    """
    rows: dict[int, Row] = {}
    for event in events:
        trial = event["trial"]
        if event["event"] != "start" and trial not in rows:
            continue
        row = rows.setdefault(trial, {"trial": trial, "state": "running", "steps": 0})
        if event["event"] == "start":
            rows[trial] = row | event["parameters"] | dict.fromkeys(METRICS) | {"reason": None} | row
        elif event["event"] == "report":
            row.update({"steps": event["step"]} | {key: event.get(key) for key in METRICS})
        elif event["event"] == "end":
            row.update(state=event["state"], reason=event["reason"])
    return [rows[trial] for trial in sorted(rows)]


def run_rows(run: RunDirectory) -> list[Row]:
    """The rows of a run directory."""
    return trial_rows(read_events(run.trials))


def ended_count(rows: Iterable[Mapping[str, Any]]) -> int:
    """How many of the trials have come to an end, of whatever kind."""
    return sum(row["state"] != "running" for row in rows)


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
