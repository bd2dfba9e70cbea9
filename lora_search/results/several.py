"""`open_runs`: several runs, and published experiments, in the same frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_search.errors import InputError
from lora_search.results.frames import reports_frame, rows_frame
from lora_search.results.published import METRIC, MODE, read_published
from lora_search.results.rows import Row, best_row
from lora_search.results.run import open_run
from lora_search.rundir import at_home
from lora_search.storage import is_uri

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class _Source:
    """A run, or a folder of published experiments."""

    name: str
    metric: str
    mode: str
    rows: list[Row]
    reports: pd.DataFrame


class Runs:
    """The results of several runs. `run` tells their rows apart, `model` is their base.

    Columns, dtypes and units are documented in `lora_search.results.COLUMNS`.
    """

    trials: pd.DataFrame
    """One row a trial."""
    reports: pd.DataFrame
    """One row a report."""
    best: pd.DataFrame
    """The best trial of each run that has one, with `metric`, what its run is judged by, and `value`."""

    def __init__(self, sources: Iterable[_Source]) -> None:
        import pandas as pd

        sources = list(sources)
        self.names = [source.name for source in sources]
        self.trials = rows_frame([{"run": source.name} | row for source in sources for row in source.rows])
        reports = [source.reports.assign(run=source.name) for source in sources if len(source.reports)]
        self.reports = pd.concat(reports, ignore_index=True) if reports else reports_frame([])
        if reports:
            self.reports.insert(0, "run", self.reports.pop("run").astype("string"))
        self.best = rows_frame(list(_best_rows(sources)))

    def __repr__(self) -> str:
        return f"Runs({', '.join(self.names)})"


def _best_rows(sources: Iterable[_Source]) -> Iterator[Row]:
    for source in sources:
        best = best_row(source.rows, source.metric, "min" if source.mode == "min" else "max")
        if best is not None:
            yield {"run": source.name, "metric": source.metric, "value": best[source.metric]} | best


def open_runs(*runs: str | Path) -> Runs:
    """The results of several runs together.

    Args:
        runs: each a run directory (path, URI, or name under `runs/`), a folder of run directories, or result files of
            PEFT's method comparison: one JSON file, or a folder of them, whose experiments are the trials of one run.

    Raises:
        InputError: one of them is none of these.
        SweepError: a file is not what it should be.
    """
    return Runs(_told_apart([source for run in runs for source in _open(str(run))]))


def _open(place: str) -> Iterator[_Source]:
    path = at_home(place)
    if is_uri(place) or (path / "sweep.yaml").is_file():
        yield _run(place)
    elif path.is_file() and path.suffix == ".json":
        yield _published(path.stem, [path])
    elif path.is_dir() and (found := sorted(path.glob("*/sweep.yaml"))):
        for file in found:
            yield _run(str(file.parent))
    elif path.is_dir() and (found := sorted(path.glob("*.json"))):
        yield _published(path.resolve().name, found)
    elif path.exists():
        raise InputError(
            f"RUN: found {place!r}, which is neither a run directory, nor a folder of them, nor result files of PEFT's "
            "method comparison"
        )
    else:
        yield _run(place)


def _run(place: str) -> _Source:
    run = open_run(place)
    rows = [{"trial": row["trial"], "model": run.spec.base.model} | row for row in run.rows]
    return _Source(run.name, run.metric, run.mode, rows, run.reports)


def _published(name: str, files: list[Path]) -> _Source:
    experiments = [read_published(file) for file in files]
    rows = [experiment.row(trial) for trial, experiment in enumerate(experiments)]
    reports = rows_frame(
        [report for trial, experiment in enumerate(experiments) for report in experiment.reports(trial)]
    )
    return _Source(name, METRIC, MODE, rows, reports)


def _told_apart(sources: list[_Source]) -> list[_Source]:
    """Runs of one name get a number, as run directories do."""
    seen: dict[str, int] = {}
    apart = []
    for source in sources:
        seen[source.name] = number = seen.get(source.name, 0) + 1
        apart.append(source if number == 1 else replace(source, name=f"{source.name} ({number})"))
    return apart
