"""The local record: trials.jsonl, one line an event, appended as it happens."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_search.results import read_events
from lora_search.tracking.events import Observer, State


class RunRecord(Observer):
    """Appends to a run directory's trials.jsonl.

    Events: `start` (parameters), `report` (the report's figures, `history` an entry a step), `checkpoint` (step and
    path), `resume` (the step from which a trial goes on, and which later checkpoints were damaged), `end` (state,
    reason). Every line has `event`, `trial` and `time`, in seconds since 1970, which never run back: where the clock
    is put back, or that of the machine that goes on with a sweep is behind, they go on from the last line.
    """

    essential = True

    def __init__(self, file: Path, clock: Callable[[], float] = time.time) -> None:
        self._file = file.open("a", encoding="utf-8", buffering=1)  # a line is out as soon as it is whole
        self._clock = clock
        self._last = max((float(event["time"]) for event in read_events(file)), default=0.0)
        self._ahead_s = 0.0
        """Of the times in the record, before our clock."""

    def trial_started(self, trial: int, parameters: Mapping[str, Any]) -> None:
        self._append("start", trial, parameters=parameters)

    def trial_resumed(self, trial: int, parameters: Mapping[str, Any], step: int, damaged: Sequence[str]) -> None:
        self._append("resume", trial, step=step, damaged=list(damaged))

    def trial_reported(self, trial: int, report: Mapping[str, Any]) -> None:
        self._append("report", trial, **report)

    def trial_saved(self, trial: int, step: int, path: str) -> None:
        self._append("checkpoint", trial, step=step, path=path)

    def trial_ended(self, trial: int, state: State, reason: str | None) -> None:
        self._append("end", trial, state=state, reason=reason)

    def close(self) -> None:
        self._file.close()

    def _append(self, event: str, trial: int, **fields: Any) -> None:
        line = {"event": event, "trial": trial, "time": round(self._now(), 3), **fields}
        self._file.write(json.dumps(_finite(line), ensure_ascii=False) + "\n")

    def _now(self) -> float:
        now = self._clock() + self._ahead_s
        self._ahead_s += max(0.0, self._last - now)
        self._last = max(self._last, now)
        return self._last


def _finite(value: Any) -> Any:
    """NaN and infinity are no JSON: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
