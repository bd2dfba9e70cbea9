"""`lora-search results` and `lora-search status`."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_search.cli.out import local_path
from lora_search.errors import InputError, SweepError, harmless
from lora_search.results import (
    Row,
    Run,
    ahead_row,
    best_row,
    column,
    read_events,
    render,
    rows_frame,
    run_rows,
    trial_rows,
)
from lora_search.results.hosts import host_packs
from lora_search.rundir import RunDirectory, find_run, is_locked
from lora_search.space import planned_trials
from lora_search.spec import SweepSpec, recorded_spec

COLUMNS = ("trial", "state", "steps", "rank", "alpha", "dropout", "target_modules", "learning_rate")


def results(run: str, form: str, out: str | None) -> None:
    """Print the trials, or write them to a file.

    Raises:
        InputError: the file cannot be written.
    """
    file = None if out is None else local_path(out)
    directory = find_run(run)
    try:
        _write(directory, run_rows(directory), form, file)
    except OSError as error:
        if file is None:
            raise
        raise InputError(f"--out {file}: cannot be written: {error.strerror or error}") from None


def _write(directory: RunDirectory, rows: list[Row], form: str, file: Path | None) -> None:
    if form == "parquet":
        if file is None:
            raise InputError("--format parquet: needs --out FILE; Parquet is no text")
        from pyarrow.lib import ArrowException

        try:
            rows_frame(rows).to_parquet(file, index=False)
        except (ArrowException, OverflowError) as error:  # a column of values of several kinds
            raise SweepError(f"{directory.trials}: cannot be a Parquet table: {error}") from None
    elif form == "table":
        _print_table(recorded_spec(directory.spec), rows, file)
    else:
        is_shown = file is None and sys.stdout.isatty()  # a terminal does what control characters say
        text = render(rows, "csv" if form == "csv" else "json", ascii_only=is_shown)
        if file is None:
            sys.stdout.write(harmless(text) if is_shown else text)
        else:
            file.write_text(text, encoding="utf-8")


def status(run: str, *, as_json: bool) -> None:
    """Print where a sweep stands."""
    directory = find_run(run)
    found = sweep_status(directory)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    trials = found["trials"]
    ended = sum(trials.values()) - trials["running"]
    print(f"{found['name']}: {found['phase']}, {ended} of {found['planned']} trials have ended")
    called = {"running": "that --resume goes on with"} if found["phase"] == "interrupted" else {}
    print("  " + ", ".join(f"{count} {called.get(state, state)}" for state, count in trials.items()))
    if found["best"]:
        print(f"  best: {_result(found['best'], found['metric'])}")
    if found["ahead"]:
        print(f"  ahead, and not at its end: {_result(found['ahead'], found['metric'])}")
    for host, pack in found["hosts"].items():
        print(f"  {harmless(_place(host, pack['node']))}: {_pack(pack)}")
    for lost in found["lost_hosts"]:
        print(f"  {harmless(_place(lost['name'], lost['node']))} was lost: {harmless(lost['why'])}")
    if found["resumed"]:
        print(f"  trials went on from a checkpoint, or over again, after a loss: {_times(found['resumed'])}")
    for reason, count in found["failures"].items():
        print(f"  failed {_times(count)}: {harmless(str(reason))}")
    if found["last_event_seconds_ago"] is not None:
        print(f"  last heard of {_ago(found['last_event_seconds_ago'])}")


def _result(row: Row, metric: str) -> str:
    return f"trial {row['trial']}, {metric} {row[metric]:.4f} at step {row['steps']}"


def _place(host: str, node: str | None) -> str:
    return host if node is None else f"{host} on node {node[:8]}"


def _pack(pack: Mapping[str, Any]) -> str:
    trials, places, speed = pack["trials"], pack["capacity"], pack["tokens_per_second"]
    of = "" if places is None else f" (at most {places})"
    noun = "trial" if len(trials) == 1 else "trials"
    what = f"{noun} {', '.join(map(str, trials))}{of}" if trials else "none of its trials has reported yet"
    return f"{what}, {speed:,.0f} tokens/s" if speed else what


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _ago(seconds: float) -> str:
    """By this machine's clock, of what another machine has dated by its own."""
    if round(seconds) < 0:
        return f"at a time {-seconds:.0f} s ahead of this machine's clock: that of the machine it runs on differs"
    return f"{max(0.0, seconds):.0f} s ago"


def sweep_status(directory: RunDirectory) -> dict[str, Any]:
    """Where a sweep stands, from its run directory alone."""
    spec = recorded_spec(directory.spec)
    events = list(read_events(directory.trials))
    rows = trial_rows(events)
    states = ("running", "completed", "stopped", "failed")
    counts = {state: sum(row["state"] == state for row in rows) for state in states}
    run = Run(directory)
    finished = "conclusion" in run.provenance
    phase = "running" if is_locked(directory) else "finished" if finished else "interrupted"
    return {
        "name": directory.name,
        "path": directory.place,
        "phase": phase,
        "metric": spec.search.metric,
        "planned": planned_trials(spec),
        "trials": counts,
        "hosts": host_packs(run.hosts, events, run.resumed or 0.0) if phase == "running" else {},
        "lost_hosts": [
            {"name": host.name, "node": host.node, "why": host.lost} for host in run.hosts if host.lost is not None
        ],
        "resumed": sum(event["event"] == "resume" for event in events),
        "failures": dict(Counter(row["reason"] for row in rows if row["state"] == "failed")),
        "best": best_row(rows, spec.search.metric, spec.search.mode),
        "ahead": ahead_row(rows, spec.search.metric, spec.search.mode),
        "last_event_seconds_ago": round(time.time() - events[-1]["time"], 1) if events else None,
    }


def _print_table(spec: SweepSpec, rows: list[Row], file: Path | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    searched = [column(name) for name in spec.search.space if column(name) not in (*COLUMNS, "alpha_ratio")]
    metric = spec.search.metric
    table = Table()
    for name in (*COLUMNS, *searched, metric):
        table.add_column(name, justify="left" if name in ("state", "target_modules") else "right", overflow="fold")
    best = best_row(rows, metric, spec.search.mode)
    sign = 1 if spec.search.mode == "min" else -1
    for row in sorted(rows, key=lambda row: (row.get(metric) is None, sign * (row.get(metric) or 0), row["trial"])):
        style = "bold" if best and row["trial"] == best["trial"] else ""
        table.add_row(*(escape(_cell(row.get(name))) for name in (*COLUMNS, *searched, metric)), style=style)
    if file is None:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    else:
        with file.open("w", encoding="utf-8") as opened:
            Console(file=opened, width=160).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return harmless(", ".join(value) if isinstance(value, list) else str(value))
