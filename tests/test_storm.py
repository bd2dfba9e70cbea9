"""Faults of every kind at random moments of sweeps over two nodes: none is lost, and each comes to what it would.

Prints what was injected how often and how many training steps were done over again: `pytest -m slow tests/test_storm.py
-s`, with STORMS=8 for more sweeps than two. The hosts' engines are real, and note every step that they make.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import noted_steps
import pytest
import yaml
from conftest import PATIENCE, flip_bit, make_spec, processes, two_nodes
from noted_steps import jumps_back, repeated, steps_made
from rich.console import Console
from rich.table import Table
from test_faults import require_whole

from lora_search.checkpoint import KEPT
from lora_search.results import Row, read_events, run_rows
from lora_search.rundir import RunDirectory

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

    from lora_search.spec import SweepSpec

SEEDS = range(int(os.environ.get("STORMS", "2")))
TRIALS, STEPS, EVAL_EVERY = 12, 400, 40

FAULTS = {
    "seat": "SIGKILL of a seat",
    "host": "SIGKILL of a host",
    "damage": "a checkpoint damaged, SIGKILL of all hosts",
    "node": "SIGKILL of a node, raylet and all; another joins",
    "warn": "SIGTERM of the driver; resumed",
    "driver": "SIGKILL of the driver; resumed",
    "torn": "the same, and the record's last lines torn",
}
PER_STORM = 2
"""Of each kind."""

CLOSE = 1e-4
"""Relative, of a loss trained in other company (DESIGN: the same result, alone or in company)."""


@dataclass
class Tally:
    """What was injected, and what it cost."""

    injected: Counter[str] = field(default_factory=Counter)
    repeated: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    lost: int = 0
    apart: float = 0.0
    """Largest relative difference of a loss from the undisturbed sweep's."""

    def show(self) -> None:
        table = Table(title=f"{len(SEEDS)} sweeps of {TRIALS} trials of {STEPS} steps, a report each {EVAL_EVERY}")
        table.add_column("injected")
        for name in ("times", "steps repeated"):
            table.add_column(name, justify="right")
        for kind, what in FAULTS.items():
            table.add_row(what, str(self.injected[kind]), str(self.repeated[kind]))
        table.add_row("all", str(self.injected.total()), f"{self.repeated.total()} of {self.steps:,}")
        Console(width=100).print(table, f"trials lost: {self.lost}; losses apart by {self.apart:.1e} at most")


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    tally.show()


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    with two_nodes() as nodes:
        yield nodes


class Storm:
    """Runs a sweep to its end through faults, one as soon as the sweep has come on after the one before."""

    def __init__(self, spec: SweepSpec, nodes: Cluster, seed: int, tally: Tally) -> None:
        self._spec, self._nodes, self._tally = spec, nodes, tally
        self.run = RunDirectory(Path(spec.output) / spec.name)
        self._draw = random.Random(seed)
        self._faults = list(FAULTS) * PER_STORM
        self._draw.shuffle(self._faults)
        self._kind, self._before = "", 0
        self._process = self._start()

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        file = Path(self._spec.output) / "sweep.yaml"
        file.write_text(yaml.safe_dump(self._spec.model_dump(mode="json")))
        command = [sys.executable, noted_steps.__file__, "run", str(file), "--address", self._nodes.address, *options]
        with (Path(self._spec.output) / "said").open("ab") as said:
            return subprocess.Popen(command, stdout=said, stderr=said)

    def weather(self) -> None:
        """Until the sweep has ended."""
        deadline = time.monotonic() + 2 * PATIENCE
        heard = self._reports()
        while (status := self._process.poll()) is None:
            assert time.monotonic() < deadline, self.said()
            if self._faults and self._reports() > heard:
                time.sleep(self._draw.uniform(0, 1.5))
                if self._process.poll() is None:
                    self._strike(self._faults.pop())
                    heard = self._reports()
                    deadline = time.monotonic() + 2 * PATIENCE
            time.sleep(0.05)
        assert status == 0, self.said()
        self._count("", repeated(Path(self._spec.output)))

    def said(self) -> str:
        return (Path(self._spec.output) / "said").read_text()[-6000:]

    def _reports(self) -> int:
        return self.run.trials.read_text().count('"report"') if self.run.trials.exists() else 0

    def _count(self, kind: str, now: int) -> None:
        """The steps repeated since the last fault are that one's; the next is of this kind."""
        if self._kind:
            self._tally.repeated[self._kind] += now - self._before
        self._kind, self._before = kind, now

    def _strike(self, kind: str) -> None:
        """Counts as injected where it has hit something; otherwise it comes again, last of all."""
        now = repeated(Path(self._spec.output))
        if getattr(self, f"_{kind}")():
            self._tally.injected[kind] += 1
            self._count(kind, now)
        else:
            self._faults.insert(0, kind)

    def _kill(self, *titles: str, every: bool = False) -> bool:
        victims = processes(*titles)
        self._draw.shuffle(victims)
        for victim in victims if every else victims[:1]:
            os.kill(victim, signal.SIGKILL)
        return bool(victims)

    def _seat(self) -> bool:
        return self._kill("ray::Seat")

    def _host(self) -> bool:
        return self._kill("ray::Host")

    def _damage(self) -> bool:
        """One bit of the newest checkpoint of a trial that runs."""
        running = [row["trial"] for row in run_rows(self.run) if row["state"] == "running"]
        trial = self._draw.choice(running or [0])
        saved = sorted((self.run.tune / f"trial-{trial:04d}").glob("checkpoint_*/adapter_model.safetensors"))
        if not saved:
            return False
        flip_bit(saved[-1], self._draw.randrange(saved[-1].stat().st_size))
        return self._kill("ray::Host", every=True)

    def _node(self) -> bool:
        self._nodes.remove_node(self._draw.choice(list(self._nodes.worker_nodes)), allow_graceful=False)
        self._nodes.add_node(num_cpus=1, num_gpus=1)
        return True

    def _warn(self) -> bool:
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(PATIENCE)
        assert status in (130, 0), self.said()  # 0: it had just ended
        self._process = self._start("--resume")
        return status == 130

    def _end_driver(self) -> None:
        self._process.kill()
        self._process.wait()

    def _driver(self) -> bool:
        self._end_driver()
        self._process = self._start("--resume")
        return True

    def _torn(self) -> bool:
        self._end_driver()
        record = self.run.trials
        os.truncate(record, record.stat().st_size - self._draw.randrange(1, 400))
        with (self.run.path / "study.journal").open("a") as journal:
            journal.write('{"op_code": 6, "worker')
        self._process = self._start("--resume")
        return True


def storm_spec(tiny: Path, output: Path) -> SweepSpec:
    return make_spec(
        tiny,
        name="storm",
        hosts={"trials_per_host": 2, "max_retries": 20, "wait_s": 60},
        search={"trials": TRIALS, "sampler": {"name": "random"}, "scheduler": {"name": "none"}},
        training={"steps": STEPS, "eval_every": EVAL_EVERY},
        output=str(output),
    )


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    from lora_search.rundir import create_run
    from lora_search.sweep.run import run_sweep

    spec = storm_spec(tiny, tmp_path_factory.mktemp("undisturbed"))
    return run_sweep(spec, create_run(Path(spec.output), spec.name, exact=True)).rows


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_sweep_in_a_storm_comes_to_what_it_would_have(
    seed: int, undisturbed: list[Row], nodes: Cluster, tally: Tally, tiny: Path, tmp_path: Path
) -> None:
    storm = Storm(storm_spec(tiny, tmp_path), nodes, seed, tally)
    storm.weather()
    rows = run_rows(storm.run)
    tally.lost += TRIALS - len(rows)
    tally.steps += TRIALS * STEPS
    require_whole(storm.run, TRIALS)
    assert set(steps_made(tmp_path)) == {(trial, step) for trial in range(TRIALS) for step in range(1, STEPS + 1)}
    events = list(read_events(storm.run.trials))
    anew = {event["trial"] for event in events if event["event"] == "resume" and len(event["damaged"]) == KEPT}
    for trial, last, step in jumps_back(tmp_path):
        assert trial in anew or last - step < 2 * EVAL_EVERY, (trial, last, step)
    reports = Counter(event["trial"] for event in events if event["event"] == "report")
    assert set(reports.values()) == {STEPS // EVAL_EVERY}
    for row, alone in zip(rows, undisturbed, strict=True):
        for name in ("trial", "state", "steps", "tokens", *storm_spec(tiny, tmp_path).search.space):
            assert row[name] == alone[name], name
        apart = abs(row["eval_loss"] / alone["eval_loss"] - 1)
        tally.apart = max(tally.apart, apart)
        assert apart < CLOSE
