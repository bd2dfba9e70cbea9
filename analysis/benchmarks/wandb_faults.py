"""What a Weights & Biases that is not reached, slow or broken costs a sweep: its training goes on at the same speed.

    python analysis/benchmarks/wandb_faults.py [--trials 8] [--steps 80] [--rounds 3] [--json FILE]

Each round runs sweeps/demo.yaml, shortened, once without W&B, once with one that is well (offline: all of it but the
network), and once with each fault of a server on this machine: one that nobody answers, one that answers 500, one that
takes five seconds for every answer, and one that never answers. They take turns, each round from another one on. Told
are the seconds from the first trial's start to the last one's end, and the trials' own tokens/s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_search.results import open_run, read_events

WITHOUT, WELL = "without W&B", "offline"

WAYS = (WITHOUT, WELL, "refuses", "answers 500", "answers 500 after 5 s", "never answers")


@dataclass(frozen=True)
class Round:
    """One sweep."""

    way: str
    seconds: float
    """From the first trial's start to the last one's end."""
    tokens_per_second: float
    """Median over its trials."""
    losses: tuple[float, ...]


@contextmanager
def server(way: str) -> Iterator[str]:
    """The URL of a W&B that misbehaves."""
    over = threading.Event()

    class Faulty(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if way.endswith("after 5 s"):
                over.wait(5)
            if way == "never answers":
                over.wait()
            self.send_response(500)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the faults are meant."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    listening.daemon_threads = True
    if way == "refuses":
        listening.server_close()
    else:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        over.set()
        if way != "refuses":
            listening.shutdown()
            listening.server_close()


def run_round(way: str, trials: int, steps: int, folder: Path) -> Round:
    """A sweep in a process of its own: what W&B knows of a server lasts as long as the process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    with server(way) as url:
        modes = {WITHOUT: {"WANDB_MODE": "disabled"}, WELL: {"WANDB_MODE": "offline"}}
        environment |= modes.get(way, {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0123abcd" * 5})
        name = f"{way.replace(' ', '-').replace('&', '')}-{time.time_ns()}"
        sets = {
            "search.trials": trials,
            "search.scheduler.name": "none",
            "search.sampler.name": "random",
            "training.steps": steps,
            "output": str(folder),
        }
        command = [sys.executable, "-m", "lora_search", "run", "sweeps/demo.yaml", "--name", name]
        command += [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(answer.stderr)
    if way not in modes and "W&B failed and is left out" not in answer.stderr:
        raise RuntimeError(f"{way}: W&B was not told to fail: {answer.stderr}")
    times = [
        event["time"] for event in read_events(folder / name / "trials.jsonl") if event["event"] in ("start", "end")
    ]
    rows = open_run(folder / name).rows
    return Round(
        way,
        max(times) - min(times),
        statistics.median(row["tokens_per_second"] for row in rows),
        tuple(row["eval_loss"] for row in sorted(rows, key=lambda row: row["trial"])),
    )


def main() -> None:
    """Run all rounds and print the medians, and the ratios to the sweep without W&B, and with one that is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            ways = [WAYS[(number + place) % len(WAYS)] for place in range(len(WAYS))]
            rounds += [run_round(way, arguments.trials, arguments.steps, Path(folder)) for way in ways]
    table = Table(title=f"{arguments.trials} trials, {os.cpu_count()} cores", title_justify="left")
    for column in ("W&B", "seconds", "of without", "of offline", "tokens/s", "of without", "of offline"):
        table.add_column(column, justify="left" if column == "W&B" else "right")
    by_way = {way: [round_ for round_ in rounds if round_.way == way] for way in WAYS}
    for way, these in by_way.items():
        cells = [way]
        for measured, shown in ((lambda one: one.seconds, ".1f"), (lambda one: one.tokens_per_second, ",.0f")):
            cells.append(format(statistics.median(map(measured, these)), shown))
            for other in (WITHOUT, WELL):
                pairs = zip(map(measured, these), map(measured, by_way[other]), strict=True)
                cells.append(f"{statistics.median(one / two for one, two in pairs):.2f}")
        table.add_row(*cells)
    Console(width=110).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(round_) for round_ in rounds], indent=1) + "\n")
    if any(abs(a / b - 1) > 1e-3 for round_ in rounds for a, b in zip(round_.losses, rounds[0].losses, strict=True)):
        raise RuntimeError("the sweeps came to different losses")


if __name__ == "__main__":
    main()
