"""A machine is lost in the middle of writing a checkpoint: half of a file is there, and nobody left to finish it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from conftest import PATIENCE, SOON, make_spec, preloaded, two_nodes
from test_cluster import GONE
from test_faults import require_whole

from lora_search.checkpoint import ADAPTER_WEIGHTS, TRIAL
from lora_search.results import read_events
from lora_search.rundir import RunDirectory, create_run
from lora_search.sweep.run import run_sweep
from lora_search.tracking import Observer

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

EVERY = 4
TRIALS = 6
TORN = (0, 2 * EVERY)
"""Trial and step of the checkpoint that is half written."""

TAKEN = 100
"""Bytes of its file that are written."""


@contextmanager
def nodes(torn: Path, taken: int, mark: Path) -> Iterator[Cluster]:
    """Two nodes, and a head that has room for no seat, with a disk that hangs once.

    Args:
        torn: how the path of the file begins that is not written to its end.
        taken: bytes of it that the disk takes.
        mark: a file that holds, from then on, the id of the process that stands still.
    """
    environment = {
        "LD_PRELOAD": preloaded("torn_write.c"),
        "RAY_LD_PRELOAD_ON_WORKERS": "1",
        "TORN_FILE": str(torn),
        "TORN_BYTES": str(taken),
        "TORN_MARK": str(mark),
    }
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            nodes = stack.enter_context(two_nodes(memory=1, _system_config=SOON))
        yield nodes


class Lightning(Observer):
    """Kills the node, with every process on it, one of which stands in the middle of writing a checkpoint."""

    def __init__(self, run: RunDirectory, file: str) -> None:
        self.folder = run.tune.resolve() / f"trial-{TORN[0]:04d}" / f"checkpoint_{TORN[1]:06d}"
        self.torn = self.folder / f".{file}."
        self.mark = run.path.with_name("mark")
        self._thread = threading.Thread(target=self._strike, daemon=True)
        self.left: dict[str, int] = {}
        """Of the checkpoint's files, bytes at that moment."""
        self.killed: list[str] = []
        self.resumed: list[tuple[int, int, int]] = []

    def trial_saved(self, trial: int, step: int, path: str) -> None:
        if (trial, step) == (TORN[0], TORN[1] - EVERY):
            self._thread.start()

    def trial_resumed(self, trial: int, parameters: Mapping[str, Any], step: int, damaged: Any) -> None:
        self.resumed.append((trial, step, len(damaged)))

    def _strike(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not (self.mark.exists() and self.mark.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        writer = psutil.Process(int(self.mark.read_text()))
        raylet = next(parent for parent in writer.parents() if "raylet" in parent.name())
        victims = [raylet, *raylet.children(recursive=True)]
        assert writer in victims
        self.killed = [" ".join(victim.cmdline())[:40].strip() for victim in victims]
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                os.kill(victim.pid, signal.SIGKILL)
        self.left = {entry.name: entry.stat().st_size for entry in self.folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("file", [ADAPTER_WEIGHTS, TRIAL])
def test_node_lost_while_it_writes_a_checkpoint_loses_nothing(tiny: Path, tmp_path: Path, file: str) -> None:
    """Its raylet, host and seats are killed at once, with half of the weights written, or all but the seal."""
    space = {"rank": 8, "target_modules": "all-linear", "learning_rate": {"log_uniform": [1.0e-4, 1.0e-2]}}
    spec = make_spec(
        tiny,
        name="torn",
        hosts={"trials_per_host": 2},
        search={"space": space, "trials": TRIALS, "scheduler": {"name": "none"}},
        training={"steps": 5 * EVERY, "eval_every": EVERY},
        output=str(tmp_path),
    )
    run = create_run(tmp_path, spec.name, exact=True)
    lightning = Lightning(run, file)
    said: list[str] = []
    with nodes(lightning.torn, TAKEN, lightning.mark) as cluster:
        outcome = run_sweep(spec, run, [lightning], address=cluster.address, say=said.append)

    (half,) = (name for name in lightning.left if name.startswith(lightning.torn.name))
    assert lightning.left[half] == TAKEN
    assert (ADAPTER_WEIGHTS in lightning.left) == (file == TRIAL)
    assert TRIAL not in lightning.left
    assert [title for title in lightning.killed if title.startswith("ray::Host")], lightning.killed
    assert [line for line in said if "was lost: " in line and any(why in line for why in GONE)]

    require_whole(run, TRIALS)
    assert {(row["state"], row["steps"]) for row in outcome.rows} == {("completed", 5 * EVERY)}
    assert (TORN[0], TORN[1] - EVERY, 1) in lightning.resumed  # the half checkpoint was seen, and not used
    saved: dict[int, int] = {}
    for event in read_events(run.trials):
        if event["event"] == "checkpoint":
            saved[event["trial"]] = event["step"]
        elif event["event"] == "resume":
            reached = saved.get(event["trial"], 0) + EVERY  # a trial stands still there until it is saved
            assert reached - event["step"] < 2 * EVERY
