"""What a trial costs besides its training: the whole Ray side around an engine that does nothing.

    python analysis/benchmarks/orchestration.py [--trials 60] [--repeat 3] [--json FILE]

Each round runs a sweep of trials with nine reports and nine checkpoints each: seats, host, searcher, study, record,
checkpoints on disk, with W&B (offline) and without, alternating. Ray is started once and is not counted; the seats'
processes are started anew in each round, and are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_search.checkpoint import Checkpoint, seal
from lora_search.placement import HostPlace
from lora_search.rundir import create_run
from lora_search.space import TrialConfig
from lora_search.spec import SweepSpec, parse_spec
from lora_search.sweep.cluster import cluster
from lora_search.sweep.hosts import Hosts
from lora_search.sweep.trials import search
from lora_search.tracking import Observer
from lora_search.tracking.wandb import WandbRuns

CHECKPOINT_BYTES = 1 << 20
"""About a small adapter with its optimiser."""

SWEEP = """
name: idle
search: {trials: TRIALS, scheduler: {name: none}}
training: {steps: 90, eval_every: 10}
"""


class IdleEngine:
    """Steps without computing anything; its reports have every figure."""

    pack_limit = None

    def __init__(self, checkpoint_bytes: int) -> None:
        self._steps: dict[str, int] = {}
        self._weights = os.urandom(checkpoint_bytes)

    def admit(self, trial: str, config: TrialConfig, checkpoint: Checkpoint | None = None) -> None:
        self._steps[trial] = 0

    def size(self, config: TrialConfig) -> int:
        return 0

    def fits(self, config: TrialConfig) -> bool:
        return True

    def ever(self) -> int | None:
        return None

    def room(self, config: TrialConfig | None = None) -> int:
        return 0

    def release(self, trial: str) -> None:
        del self._steps[trial]

    def position(self, trial: str) -> int:
        return self._steps[trial]

    def snapshot(self, trial: str) -> Checkpoint:
        return seal({"weights.bin": self._weights}, {"step": self._steps[trial]})

    def step(self, trials: Sequence[str]) -> dict[str, Any]:
        for trial in trials:
            self._steps[trial] += 1
        return {}

    def report(self, trials: Sequence[str]) -> dict[str, IdleReport]:
        return {trial: IdleReport(self._steps[trial]) for trial in trials}


@dataclass(frozen=True)
class IdleReport:
    """As `engine.Report`, with a loss that falls."""

    step: int

    def to_dict(self) -> dict[str, Any]:
        history = [
            {"step": step, "loss": 1.0 / step, "grad_norm": 1.0, "lr": 1e-3, "tokens": 400}
            for step in range(self.step - 9, self.step + 1)
        ]
        figures = dict.fromkeys(("perplexity", "token_accuracy", "grad_norm", "lr", "seconds"), 1.0)
        figures |= {"eval_loss": 1.0 / self.step, "train_loss": 1.0 / self.step, "tokens_per_second": 1.0}
        counts = {"tokens": 400 * self.step, "peak_memory_bytes": 1, "trainable_parameters": 1}
        return {"step": self.step, "steps_total": 90, "history": history, **figures, **counts}


@dataclass(frozen=True)
class Round:
    """One sweep: which way, and seconds a trial."""

    way: str
    seconds_per_trial: float


def build_idle(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> IdleEngine:
    """The host's engine, in place of the real one."""
    return IdleEngine(CHECKPOINT_BYTES)


def run_round(way: str, spec: SweepSpec, folder: Path) -> Round:
    """One sweep over a host of its own."""
    run = create_run(folder, spec.name, exact=False)
    observers: list[Observer] = []
    if way == "with W&B":
        observers.append(WandbRuns(spec.tracking.wandb, run.name, run.path, {}, lambda line: None))
    hosts = Hosts(spec, build_idle)
    try:
        hosts.load()
        start = time.perf_counter()
        search(spec, run, hosts, observers)
        for observer in observers:
            observer.close()
        return Round(way, (time.perf_counter() - start) / spec.search.trials)
    finally:
        hosts.end()


def main() -> None:
    """Run all rounds and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["WANDB_MODE"] = "offline"
    spec = parse_spec(SWEEP.replace("TRIALS", str(arguments.trials)), source="idle", folder=Path.cwd())
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder, cluster(None):
        for _ in range(arguments.repeat):
            rounds += [run_round(way, spec, Path(folder)) for way in ("without W&B", "with W&B")]
    table = Table(title=f"{arguments.trials} trials of 9 reports, {os.cpu_count()} cores", title_justify="left")
    for name in ("way", "median s a trial", "min", "max"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for way in ("without W&B", "with W&B"):
        seconds = [round_.seconds_per_trial for round_ in rounds if round_.way == way]
        table.add_row(way, *(f"{value:.3f}" for value in (statistics.median(seconds), min(seconds), max(seconds))))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(round_) for round_ in rounds], indent=1) + "\n")


if __name__ == "__main__":
    main()
