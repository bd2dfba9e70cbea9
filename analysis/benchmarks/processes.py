"""A command run to its end, and the memory of its processes on the way. Imports no torch: it would share its pages."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The project; commands run in it."""


@dataclass(frozen=True)
class Process:
    """One process at one moment."""

    pid: int
    title: str
    """The start of its command line; Ray writes there which actor it is and what it does."""
    bytes: int
    """Proportional set size."""


@dataclass(frozen=True)
class Sample:
    """All processes of a command at one moment."""

    time: float
    """Seconds since 1970."""
    processes: tuple[Process, ...]

    def bytes(self, chosen: Callable[[Process], bool] = lambda process: True) -> int:
        return sum(process.bytes for process in self.processes if chosen(process))


@dataclass(frozen=True)
class Finished:
    """A command that has come to its end."""

    seconds: float
    """Wall time, start of Python included."""
    samples: tuple[Sample, ...]

    @property
    def peak_bytes(self) -> int:
        """Most that all of its processes had at once, as far as it was looked at."""
        return max((sample.bytes() for sample in self.samples), default=0)


def run_watched(command: Sequence[str], log: Path, every: float) -> Finished:
    """Run a Python command in the project's folder, looking at its processes every so many seconds.

    Ends the program where the command fails.
    """
    samples = []
    with log.open("w") as output:
        start = time.perf_counter()
        running = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=output)
        while True:
            try:
                running.wait(every)
                break
            except subprocess.TimeoutExpired:
                samples.append(look(running.pid))
        seconds = time.perf_counter() - start
    if running.returncode:
        sys.exit(f"{' '.join(command)} ended with {running.returncode}:\n{log.read_text()[-4000:]}")
    return Finished(seconds, tuple(samples))


def look(root: int) -> Sample:
    """A process and all below it, now."""
    processes = []
    for pid in descendants(root):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            processes.append(Process(pid, title[:80], proportional_bytes(pid)))
        except OSError:
            continue  # it has ended meanwhile
    return Sample(time.time(), tuple(processes))


def descendants(root: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                # pid (name) state parent ...; the name may hold anything, parentheses and spaces too
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def proportional_bytes(pid: int | str = "self") -> int:
    """The proportional set size of a process: its own memory, and its share of what it shares."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"process {pid} has no Pss")
