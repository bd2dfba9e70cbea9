"""`open_run`: one run directory, one's own or somebody else's, running or not, as frames."""

from __future__ import annotations

import json
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_search.errors import SweepError
from lora_search.journal import open_study
from lora_search.results.events import Event, read_events
from lora_search.results.frames import reports_frame, rows_frame
from lora_search.results.hosts import RunHost, run_hosts
from lora_search.results.rows import Row, best_row, trial_rows
from lora_search.rundir import RunDirectory, find_run
from lora_search.spec import SweepSpec, recorded_spec

if TYPE_CHECKING:
    import optuna
    import pandas as pd


DEEPEST = 50
"""Levels of provenance.json; what reads it calls itself at each."""


class Run:
    """The results of one sweep. Reads each file once, when it is first asked for; `open_run` again to see more.

    Columns, dtypes and units are documented in `lora_search.results.COLUMNS`.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory

    def __repr__(self) -> str:
        return f"Run({self.directory.place!r})"

    @property
    def name(self) -> str:
        return self.directory.name

    @cached_property
    def spec(self) -> SweepSpec:
        """The resolved sweep file."""
        return recorded_spec(self.directory.spec)

    @property
    def metric(self) -> str:
        """What trials are judged by: eval_loss, perplexity, token_accuracy or train_loss."""
        return self.spec.search.metric

    @property
    def mode(self) -> str:
        """`min` where a smaller metric is better, else `max`."""
        return self.spec.search.mode

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Versions, seeds, devices, the data's fingerprint; `conclusion` once the best adapter is tested and merged.

        Raises:
            SweepError: the file cannot be read, is no JSON, or is nested deeper than anything that we write.
        """
        try:
            found = json.loads(self.directory.provenance.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            reason = error.strerror or error
            raise SweepError(f"{self.directory.provenance}: cannot be read: {reason}") from None
        except (ValueError, RecursionError) as error:
            raise SweepError(f"{self.directory.provenance}: not JSON: {error}") from None
        if not isinstance(found, dict):
            raise SweepError(f"{self.directory.provenance}: found {str(found)[:80]}; should be a mapping")
        if _is_deep(found):
            raise SweepError(f"{self.directory.provenance}: is nested deeper than {DEEPEST} levels")
        return found

    @property
    def hosts(self) -> list[RunHost]:
        """Those that there have been since the sweep was begun, or resumed last.

        Raises:
            SweepError: as `provenance`.
        """
        return run_hosts(self.provenance.get("hosts"))

    @property
    def resumed(self) -> float | None:
        """When the sweep was resumed last, in seconds since 1970; None where it never was, or does not say.

        Raises:
            SweepError: as `provenance`.
        """
        times = self.provenance.get("resumed")
        try:
            return datetime.fromisoformat(times[-1]).timestamp() if isinstance(times, list) and times else None
        except (TypeError, ValueError, OverflowError):  # somebody else's
            return None

    @cached_property
    def events(self) -> list[Event]:
        """The lines of trials.jsonl but for checkpoints, of which there is one a report.

        Raises:
            SweepError: a line is no event.
        """
        return list(read_events(self.directory.trials, without="checkpoint"))

    @cached_property
    def rows(self) -> list[Row]:
        """One row a trial, as plain values."""
        return trial_rows(self.events)

    @cached_property
    def trials(self) -> pd.DataFrame:
        """One row a trial: its parameters, its last report, how and when it ended."""
        return rows_frame(self.rows)

    @cached_property
    def reports(self) -> pd.DataFrame:
        """One row a report of a trial, in the order in which they were made."""
        return reports_frame(self.events)

    @cached_property
    def best(self) -> pd.Series[Any] | None:
        """The row in `trials` of the best trial that has ended; None before any has come to a result."""
        best = best_row(self.rows, self.spec.search.metric, self.spec.search.mode)
        return None if best is None else self.trials.loc[self.trials["trial"] == best["trial"]].iloc[0]

    @cached_property
    def study(self) -> optuna.Study:
        """The Optuna study, to read: a stopped trial is PRUNED there, one that failed is FAIL.

        Raises:
            SweepError: the run directory has none, or it cannot be read.
        """
        return open_study(self.directory.path)


def open_run(run: str | Path) -> Run:
    """The results of a run directory.

    Args:
        run: its path or URI (`s3://bucket/runs/demo`), or its name under `runs/`.

    Raises:
        InputError: there is no run directory.
    """
    return Run(find_run(str(run)))


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)
