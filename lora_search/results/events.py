"""The lines of a run directory's trials.jsonl, checked: a run directory may be somebody else's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal, Required

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from lora_search.errors import SweepError
from lora_search.spec.schema import plain_reason

Event = dict[str, Any]

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""Parquet and pandas know no integers of more than 64 bits."""

Number = Annotated[int, Field(ge=-(2**63), lt=2**63)] | float

CHECKED = ConfigDict(strict=True, allow_inf_nan=False)


@with_config(CHECKED)
class _Event(TypedDict, total=False):
    """What is asked of every line."""

    event: Required[str]
    trial: Required[Annotated[int, Field(ge=0, lt=2**31)]]
    time: Required[Annotated[float, Field(ge=0, lt=2**33)]]
    """Seconds since 1970, before 2242: pandas knows no later time."""


@with_config(CHECKED)
class _Start(_Event):
    parameters: Required[dict[str, str | bool | Number | list[str] | None]]


@with_config(CHECKED)
class _Report(_Event, total=False):
    step: Required[Count]
    steps_total: Count | None
    eval_loss: float | None
    perplexity: float | None
    token_accuracy: float | None
    train_loss: float | None
    grad_norm: float | None
    lr: float | None
    trainable_parameters: Count | None
    tokens: Count | None
    tokens_per_second: float | None
    seconds: float | None
    peak_memory_bytes: Count | None
    trial_memory_bytes: Count | None
    host: str | None


FIGURES = tuple(name for name in _Report.__annotations__ if name not in ("event", "trial", "time", "step"))
"""What a report says of its trial, besides the step."""


def _inside(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError("leads out of the run directory")
    return path


@with_config(CHECKED)
class _Checkpoint(_Event):
    step: Count
    path: Annotated[str, AfterValidator(_inside)]


@with_config(CHECKED)
class _Resume(_Event):
    step: Count
    damaged: list[str]


@with_config(CHECKED)
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

OPENING = b'{"event": "'
"""How a line begins as we write it."""

READ_AHEAD = 1 << 20

HISTORY = b', "history": ['
"""How the steps between reports begin, which are last and most of their line; no string has unescaped quotes in it."""


def read_events(file: Path, *, without: str | None = None) -> Iterator[Event]:
    """The lines of a trials.jsonl, without the steps between reports; none where there is no such file yet.

    A last line that was cut off while it was written is left out. NaN and infinity, which are no JSON, are None.

    Args:
        without: a kind of event that is passed over, unread.

    Raises:
        SweepError: the file cannot be read, a line before the last is no JSON, or a line is no event.
    """
    passed_over = None if without is None else OPENING + without.encode() + b'"'
    try:
        with BufferedReader(file.open("rb", buffering=0), READ_AHEAD) as lines:
            for number, line in enumerate(lines, start=1):
                if passed_over is not None and line.startswith(passed_over):
                    continue
                event = _quickly(line)
                if event is None:
                    is_last = not line.endswith(b"\n") or not lines.peek(1)
                    event = _carefully(line, f"{file}:{number}", is_last=is_last)
                if event is None:
                    return
                yield event
    except FileNotFoundError:
        return
    except OSError as error:
        raise SweepError(f"{file}: cannot be read: {error.strerror or error}") from None


def _quickly(line: bytes) -> Event | None:
    """A line as we write it; None for any other.

    Read and checked in one go, and the steps between reports not at all: `json.loads` takes ten times as long.
    """
    line = line.removesuffix(b"\n")
    kind = line[len(OPENING) : line.find(b'"', len(OPENING))].decode(errors="replace")
    if not line.startswith(OPENING) or kind not in KINDS:
        return None
    history = line.find(HISTORY)
    if history > 0 and line.find(b"]", history) == len(line) - 2:  # a list to the end, without any in it
        line = line[:history] + b"}"
    try:
        event: Event = KINDS[kind].validate_json(line)
        return event
    except ValidationError:
        return None


def _carefully(line: bytes, place: str, *, is_last: bool) -> Event | None:
    """A line that is not as we write it: what can be read all the same, or why it cannot; None where it is cut off."""
    try:
        event = json.loads(line.decode(), parse_constant=lambda _: None, parse_int=_bounded)
        json.dumps(event, ensure_ascii=False).encode()  # half a surrogate pair cannot be written anywhere
    except (ValueError, RecursionError) as error:
        if is_last:
            return None
        raise SweepError(f"{place}: not JSON: {error}") from None
    kind = event.get("event") if isinstance(event, dict) else None
    try:
        checked: Event = (KINDS.get(kind, ANY) if isinstance(kind, str) else ANY).validate_python(event)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        found = repr(first["input"])[:80]
        raise SweepError(f"{place}: {key + ': ' if key else ''}found {found}; {plain_reason(first['msg'])}") from None
    return checked


def _bounded(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"{digits[:20]}... is no integer of 64 bits")
    return int(digits)
