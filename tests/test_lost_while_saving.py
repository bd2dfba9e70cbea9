"""A machine is lost in the middle of writing a checkpoint: half of a file is there, and nobody left to finish it."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from conftest import PATIENCE, make_spec, two_nodes
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


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """The head has room for no seat."""
    soon = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 4}
    with two_nodes(memory=1, _system_config=soon) as nodes:
        yield nodes


class SlowFile:
    """Stands in the place where a file is about to be written, and takes no more of it than a page: a disk that hangs.

    A pipe: whoever writes stands still in the middle of the write, for as long as nobody reads.
    """

    def __init__(self, path: Path, *, full: bool) -> None:
        """
        Args:
            full: takes nothing at all, for a file that is smaller than a page.
        """
        self._path = path
        os.mkfifo(path)
        self._pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._room = fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, 4096)
        self._mine = os.write(self._pipe, bytes(self._room)) if full else 0

    def writer(self) -> psutil.Process | None:
        """The process that stands in a write to the file; None where there is none yet."""
        waiting = struct.unpack("i", fcntl.ioctl(self._pipe, termios.FIONREAD, bytes(4)))[0]
        if waiting < self._room:
            return None
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error, OSError):
                for entry in Path(f"/proc/{process.pid}/fd").iterdir():
                    with suppress(OSError):
                        if entry.readlink() == self._path:
                            return process
        return None

    def tear(self) -> int:
        """Leave an ordinary file with what had been written of it; so many bytes."""
        content = b""
        with suppress(BlockingIOError):
            while True:
                content += os.read(self._pipe, 1 << 16)
        os.close(self._pipe)
        self._path.unlink()
        self._path.write_bytes(content[self._mine :])
        return len(content) - self._mine


class Lightning(Observer):
    """Kills the node, with every process on it, whose seat stands in the middle of writing a checkpoint."""

    def __init__(self, run: RunDirectory, file: str) -> None:
        self.folder = run.tune / f"trial-{TORN[0]:04d}" / f"checkpoint_{TORN[1]:06d}"
        self._file = file
        self._thread = threading.Thread(target=self._strike, daemon=True)
        self.torn: list[tuple[int, list[str]]] = []
        """Bytes of the file that were written, and the complete files beside it."""
        self.killed: list[str] = []
        self.resumed: list[tuple[int, int, int]] = []

    def trial_saved(self, trial: int, step: int, path: str) -> None:
        if (trial, step) == (TORN[0], TORN[1] - EVERY):
            self._thread.start()

    def trial_resumed(self, trial: int, parameters: Mapping[str, Any], step: int, damaged: Any) -> None:
        self.resumed.append((trial, step, len(damaged)))

    def _strike(self) -> None:
        self.folder.mkdir()
        slow = SlowFile(self.folder / f".{self._file}.part", full=self._file == TRIAL)
        deadline = time.monotonic() + PATIENCE
        while (seat := slow.writer()) is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        raylet = next(parent for parent in seat.parents() if "raylet" in parent.name())
        victims = [raylet, *raylet.children(recursive=True)]
        assert seat in victims
        self.killed = [" ".join(victim.cmdline())[:40].strip() for victim in victims]
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                os.kill(victim.pid, signal.SIGKILL)
        left = sorted(entry.name for entry in self.folder.iterdir() if entry.is_file())
        self.torn.append((slow.tear(), left))


@pytest.mark.slow
@pytest.mark.parametrize("file", [ADAPTER_WEIGHTS, TRIAL])
def test_node_lost_while_it_writes_a_checkpoint_loses_nothing(
    nodes: Cluster, tiny: Path, tmp_path: Path, file: str
) -> None:
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
    outcome = run_sweep(spec, run, [lightning], address=nodes.address, say=said.append)

    (written, beside) = lightning.torn[0]
    assert written == (0 if file == TRIAL else 4096)
    assert ADAPTER_WEIGHTS in beside if file == TRIAL else ADAPTER_WEIGHTS not in beside
    assert TRIAL not in beside
    assert [title for title in lightning.killed if title.startswith("ray::Host")], lightning.killed
    assert [line for line in said if "was lost: its node is gone" in line]

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
