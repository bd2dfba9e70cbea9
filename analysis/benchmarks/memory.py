"""Memory of one host with 8 trials against 8 trial processes, both in a real sweep.

    python analysis/benchmarks/memory.py [--json FILE]

Proportional set size: what a process has to itself, and its share of the pages that others use too. Both commands train
the same 8 trials at the same time, on the package's own base and data; their processes are looked at every half second.
    trial processes    plain_sweep.py: 8 processes of Ray Tune, each with a base
    host               lora-search: the process that holds the base and trains all 8, while all 8 are resident
    host and seats     the same with the 8 processes that stand for the trials in Ray Tune
Ray's own processes, which both have, are in the lines `all of` alone. To aim for: a fifth, and 0.35.
Nothing else that loads torch should run meanwhile: it would share pages, and make processes look small.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from processes import Finished, Process, Sample, run_watched
from rich.console import Console
from rich.table import Table
from whole_sweep import sweep_file

from lora_search.results import read_events

WATCH_SECONDS = 0.5

HOST = "ray::Host"
SEAT = "ray::Seat"
"""Ray names an actor's process after its class."""
TRIAL = "ray::ImplicitFunc"
"""A function trainable's."""


@dataclass(frozen=True)
class Figure:
    """What some processes had at once, at most."""

    name: str
    processes: int
    bytes: int


def most(name: str, samples: Sequence[Sample], *prefixes: str) -> Figure:
    """The sample in which the processes of these titles had most together; of all processes where none is named."""

    def chosen(process: Process) -> bool:
        return process.title.startswith(prefixes or "")

    peak = max(samples, key=lambda sample: sample.bytes(chosen))
    return Figure(name, sum(map(chosen, peak.processes)), peak.bytes(chosen))


def all_resident(finished: Finished, trials: Path) -> list[Sample]:
    """The samples between the last trial's first report and the first trial's end."""
    events = list(read_events(trials))
    first: dict[int, float] = {}
    for event in events:
        if event["event"] == "report":
            first.setdefault(event["trial"], event["time"])
    end = min(event["time"] for event in events if event["event"] == "end")
    return [sample for sample in finished.samples if max(first.values()) < sample.time < end]


def all_running(finished: Finished, trials: int) -> list[Sample]:
    """The samples with every trial process in them."""
    return [
        sample
        for sample in finished.samples
        if sum(process.title.startswith(TRIAL) for process in sample.processes) >= trials
    ]


def measure(trials: int, steps: int, every: int, folder: Path) -> list[Figure]:
    """Both commands, one after the other."""
    sweep = sweep_file("demo", 0.05, folder)
    overrides = [
        "tracking.wandb.mode=disabled",
        "search.space.learning_rate=0.005",  # four ranks on two target sets remain
        f"search.trials={trials}",
        f"training.steps={steps}",
        f"training.eval_every={every}",
    ]
    given = [str(sweep), *(part for override in overrides for part in ("--set", override))]
    one_host = ["--set", "hosts.count=1", "--set", f"hosts.trials_per_host={trials}"]
    where = ["--set", f"output={folder}", "--name", "ours"]
    plain = run_watched(
        ["analysis/benchmarks/plain_sweep.py", *given, "--out", str(folder / "plain"), "--concurrent", str(trials)],
        folder / "plain.log",
        WATCH_SECONDS,
    )
    ours = run_watched(["-m", "lora_search", "run", *given, *one_host, *where], folder / "ours.log", WATCH_SECONDS)
    running = all_running(plain, trials)
    resident = all_resident(ours, folder / "ours" / "trials.jsonl")
    if not running or not resident:
        sys.exit("memory: the trials were never looked at while all were there; more --steps make the sweeps longer")
    return [
        most("trial processes", running, TRIAL),
        most("host", resident, HOST),
        most("host and seats", resident, HOST, SEAT),
        most("seats", resident, SEAT),
        most("all of plain_sweep.py", plain.samples),
        most("all of lora-search", ours.samples),
    ]


def main() -> None:
    """Measure, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.trials, arguments.steps, arguments.eval_every, Path(folder))
    plain = figures[0].bytes
    title = f"{arguments.trials} trials at once, proportional set size"
    table = Table(title=title, title_justify="left")
    for column in ("processes of", "count", "MiB", "against trial processes"):
        table.add_column(column, justify="left" if column == "processes of" else "right")
    for figure in figures:
        ratio = f"{figure.bytes / plain:.2f}"
        table.add_row(figure.name, str(figure.processes), f"{figure.bytes >> 20:,}", ratio)
    Console(width=110).print(table)
    if arguments.json:
        found = [asdict(figure) | {"against_trial_processes": figure.bytes / plain} for figure in figures]
        given = {name: value for name, value in vars(arguments).items() if name != "json"}
        arguments.json.write_text(json.dumps({"given": given, "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
