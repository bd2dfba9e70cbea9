"""`lora-search results` and `lora-search status`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from lora_search.errors import InputError
from lora_search.results import Row, best_row, frame, read_events, render, run_rows, trial_rows
from lora_search.rundir import RunDirectory, find_run
from lora_search.spec import SweepSpec, load_spec

COLUMNS = ("trial", "state", "steps", "rank", "alpha", "dropout", "target_modules", "learning_rate")


def results(run: str, form: str, out: str | None) -> None:
    """Print the trials, or write them to a file."""
    directory = find_run(run)
    rows = run_rows(directory)
    if form == "parquet":
        if out is None:
            raise InputError("--format parquet: needs --out FILE; Parquet is no text")
        frame(rows).to_parquet(out, index=False)
    elif form == "table":
        _print_table(load_spec(directory.spec), rows, out)
    else:
        text = render(rows, "csv" if form == "csv" else "json")
        if out is None:
            sys.stdout.write(text)
        else:
            Path(out).write_text(text, encoding="utf-8")


def status(run: str, *, as_json: bool) -> None:
    """Print where a sweep stands."""
    directory = find_run(run)
    found = sweep_status(directory)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['name']}: {found['phase']}")
    print("  " + ", ".join(f"{count} {state}" for state, count in found["trials"].items()))
    if found["best"]:
        best = found["best"]
        print(f"  best: trial {best['trial']}, {found['metric']} {best[found['metric']]:.4f} at step {best['steps']}")
    if found["last_event_seconds_ago"] is not None:
        print(f"  last heard of {found['last_event_seconds_ago']:.0f} s ago")


def sweep_status(directory: RunDirectory) -> dict[str, Any]:
    """Where a sweep stands, from its run directory alone."""
    spec = load_spec(directory.spec)
    events = list(read_events(directory.trials))
    rows = trial_rows(events)
    states = ("running", "completed", "stopped", "failed")
    counts = {state: sum(row["state"] == state for row in rows) for state in states}
    finished = (directory.best / "README.md").is_file()
    return {
        "name": directory.name,
        "path": directory.place,
        "phase": "finished" if finished else "unfinished",
        "metric": spec.search.metric,
        "planned": spec.search.trials,
        "trials": counts,
        "best": best_row(rows, spec.search.metric, spec.search.mode),
        "last_event_seconds_ago": round(time.time() - events[-1]["time"], 1) if events else None,
    }


def _print_table(spec: SweepSpec, rows: list[Row], out: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    searched = [name for name in spec.search.space if name not in COLUMNS and name != "alpha_ratio"]
    metric = spec.search.metric
    table = Table()
    for name in (*COLUMNS, *searched, metric):
        table.add_column(name, justify="left" if name in ("state", "target_modules") else "right", overflow="fold")
    best = best_row(rows, metric, spec.search.mode)
    order = sorted(rows, key=lambda row: (row.get(metric) is None, row.get(metric) or 0, row["trial"]))
    for row in order if spec.search.mode == "min" else reversed(order):
        style = "bold" if best and row["trial"] == best["trial"] else ""
        table.add_row(*(_cell(row.get(name)) for name in (*COLUMNS, *searched, metric)), style=style)
    if out is None:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    else:
        with Path(out).open("w", encoding="utf-8") as file:
            Console(file=file, width=160).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(value) if isinstance(value, list) else str(value)
