"""A whole sweep, command to end: plain Ray Tune with PEFT and Trainer against lora-search.

    python analysis/benchmarks/whole_sweep.py [--setting demo|e2e|asha] [--rounds 1] [--json FILE]

Settings:
    demo    the grid of 16 trials below, 60 steps each, on the package's own base and data
    e2e     the same grid on stories260k and the first 1,100 rows of E2E, which lie beside the project
    asha    sweeps/demo.yaml: 24 trials, TPE and ASHA; each round has another seed, the first the file's
Ways, alternating, each a command of its own in a process of its own:
    plain fresh    plain_sweep.py: a process for each trial, Ray Tune's default, two at a time on two cores
    plain          the same in processes that Ray Tune uses again for the next trial
    lora-search    the command that users run
W&B is off in all. With `--dropout 0` the final losses of the same configuration must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from processes import ROOT, run_watched
from rich.console import Console
from rich.table import Table

from lora_search.results import run_rows
from lora_search.rundir import RunDirectory

SHARED = ROOT.parent / "shared" / "data"

GRID = """
name: grid
base: {model: MODEL}
data: {path: DATA, LIMITS}
search:
  space:
    rank: {choice: [4, 8, 16, 32]}
    learning_rate: {choice: [0.001, 0.005]}
    target_modules: {choice: [attention-qv, all-linear]}
    alpha_ratio: 2
    dropout: DROPOUT
  enqueue: []
  sampler: {name: grid}
  scheduler: {name: none}
  trials: 16
training: {steps: 60, batch_size: 4, eval_every: 20, lr_schedule: cosine, warmup_ratio: 0.05}
"""

LIMITS = {
    "demo": "max_length: 256, validation: 0.05, test: 0.05",
    "e2e": "max_length: 512, validation: 0.1, test: 0.1, limit: 1100",
}

WAYS = ("plain fresh", "plain", "lora-search")

WATCH_SECONDS = 2.0
"""Between two looks at a command's memory: one takes about 30 ms of a core, which the command then lacks."""

Config = tuple[Any, ...]
"""What tells two trials of a sweep apart."""


@dataclass(frozen=True)
class Round:
    """One sweep, command to end."""

    way: str
    seconds: float
    trials: int
    """That came to a result."""
    steps: int
    """That these trials were trained for: under ASHA it is chance, in each way another, how many that are."""
    best_loss: float
    peak_bytes: int
    """Proportional set size of all its processes together."""
    losses: dict[Config, float]
    """Last validation loss of each trial."""


def sweep_file(setting: str, dropout: float, folder: Path) -> Path:
    """The sweep file of a setting."""
    if setting == "asha":
        return ROOT / "sweeps" / "demo.yaml"
    model, data = ("builtin:demo", "builtin:demo")
    if setting == "e2e":
        model, data = str(SHARED / "stories260k"), str(SHARED / "e2e" / "valid.jsonl")
    values = {"MODEL": model, "DATA": data, "LIMITS": LIMITS[setting], "DROPOUT": str(dropout)}
    text = GRID
    for name, value in values.items():
        text = text.replace(name, value)
    file = folder / "sweep.yaml"
    file.write_text(text)
    return file


def run_round(way: str, sweep: Path, overrides: Sequence[str], folder: Path) -> Round:
    """One way's command, and what it left."""
    settings = [part for override in overrides for part in ("--set", override)]
    if way == "lora-search":
        command = ["-m", "lora_search", "run", str(sweep), *settings, "--set", f"output={folder}", "--name", "ours"]
    else:
        fresh = ["--fresh"] if way == "plain fresh" else []
        command = ["analysis/benchmarks/plain_sweep.py", str(sweep), *settings, "--out", str(folder), *fresh]
    finished = run_watched(command, folder / "log.txt", WATCH_SECONDS)
    if way == "lora-search":
        rows = run_rows(RunDirectory(folder / "ours"))
    else:
        rows = json.loads((folder / "trials.json").read_text())["trials"]
    done = [row for row in rows if row["state"] in ("completed", "stopped")]
    losses = {config(row): float(row["eval_loss"]) for row in done}
    steps = sum(row["steps"] for row in done)
    return Round(way, finished.seconds, len(done), steps, min(losses.values()), finished.peak_bytes, losses)


def config(row: Mapping[str, Any]) -> Config:
    return tuple(row[name] for name in ("rank", "alpha", "dropout", "target_modules", "learning_rate"))


def differences(these: Mapping[Config, float], those: Mapping[Config, float]) -> list[float]:
    """Relative differences of the losses of the configurations that both have."""
    return [abs(loss / those[key] - 1) for key, loss in these.items() if key in those]


def show(title: str, rounds: Sequence[Round]) -> dict[str, Any]:
    """Print the medians, and return them."""
    ways = list(dict.fromkeys(round_.way for round_ in rounds))
    last = {way: next(round_ for round_ in reversed(rounds) if round_.way == way) for way in ways}
    seconds = {way: statistics.median(r.seconds for r in rounds if r.way == way) for way in ways}
    peak = {way: max(r.peak_bytes for r in rounds if r.way == way) for way in ways}
    differing = {way: differences(last[ways[-1]].losses, last[way].losses) for way in ways[:-1]}
    table = Table(title=title, title_justify="left")
    columns = ("way", "seconds", "ratio", "trials", "steps", "best loss", "mean difference", "largest", "MiB at most")
    for column in columns:
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in ways:
        differ = differing.get(way, [])
        table.add_row(
            way,
            f"{seconds[way]:.1f}",
            f"{seconds[way] / seconds[ways[-1]]:.2f}",
            str(last[way].trials),
            f"{statistics.median(r.steps for r in rounds if r.way == way):,.0f}",
            f"{last[way].best_loss:.4f}",
            *((f"{statistics.mean(differ):.1e}", f"{max(differ):.1e}") if differ else ("", "")),
            f"{peak[way] >> 20:,}",
        )
    Console(width=110).print(table)
    return {
        "title": title,
        "seconds": seconds,
        "differences": differing,
        "rounds": [asdict(round_) | {"losses": list(map(list, round_.losses.items()))} for round_ in rounds],
    }


def main() -> None:
    """Measure one setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="demo", choices=["demo", "e2e", "asha"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="ratios: to the last")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--trials", type=int, help="fewer than the setting has")
    parser.add_argument("--steps", type=int, help="of each trial, with a report every third of them")
    parser.add_argument("--dropout", type=float, default=0.05, help="of the grid's trials")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.setting == "e2e" and not SHARED.is_dir():
        print(f"whole_sweep: no {SHARED}, where this setting's model and data lie; nothing measured")
        sys.exit(0)
    overrides = ["tracking.wandb.mode=disabled"]
    if arguments.trials:
        overrides.append(f"search.trials={arguments.trials}")
    if arguments.steps:
        third = max(1, arguments.steps // 3)
        overrides += [f"training.steps={arguments.steps}", f"training.eval_every={third}"]
        overrides += [f"search.scheduler.first_rung={third}"] * (arguments.setting == "asha")
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        sweep = sweep_file(arguments.setting, arguments.dropout, Path(folder))
        for number in range(arguments.rounds):
            for way in arguments.ways:
                place = Path(folder) / f"{way.replace(' ', '-')}-{number}"
                place.mkdir()
                seed = [f"search.sampler.seed={number}"] * (arguments.setting == "asha")
                rounds.append(run_round(way, sweep, [*overrides, *seed], place))
    given = {name: value for name, value in vars(arguments).items() if name != "json"}
    found = show(f"{arguments.setting}: a whole sweep, command to end", rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps({"given": given, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
