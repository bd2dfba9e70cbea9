"""The run directory: where each file of a sweep lies. Knows paths, and nothing of what is in them."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lora_search.errors import InputError


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one sweep."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def spec(self) -> Path:
        """The resolved sweep file."""
        return self.path / "sweep.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def trials(self) -> Path:
        """One line a trial and report."""
        return self.path / "trials.jsonl"

    @property
    def lock(self) -> Path:
        """Held by the process that writes to the run directory."""
        return self.path / ".lock"

    @property
    def tune(self) -> Path:
        """Ray Tune's state, and the trials' checkpoints."""
        return self.path / "tune"

    @property
    def best(self) -> Path:
        return self.path / "best"


def create_run(output: Path, name: str, *, exact: bool) -> RunDirectory:
    """A new run directory `output/name`; where that is taken, `name-2`, `name-3`, ...

    Raises:
        InputError: `exact` and the name is taken, or the folder cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = output / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
                return RunDirectory(path)
            except FileExistsError:
                if exact:
                    raise InputError(f"--name {name}: {path} exists already; choose another name") from None
                number += 1
    except OSError as error:
        raise InputError(f"output: cannot make a run directory in {output}: {error}") from None


def newest_run(output: Path, name: str) -> RunDirectory | None:
    """The latest of the run directories `name`, `name-2`, `name-3`, ...; None where there is none."""
    numbered = {
        int(path.name.removeprefix(name).removeprefix("-") or 1): path
        for path in output.glob(f"{glob.escape(name)}*")
        if re.fullmatch(r"(-\d+)?", path.name.removeprefix(name)) and (path / "sweep.yaml").is_file()
    }
    return RunDirectory(numbered[max(numbered)]) if numbered else None


def run_identity(folder: Path) -> str | None:
    """What no other run directory is called, wherever it is moved; None where it has no provenance."""
    try:
        found = json.loads((folder / "provenance.json").read_text(encoding="utf-8")).get("id")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


@contextmanager
def locked(run: RunDirectory) -> Iterator[None]:
    """Keep other processes from writing to a run directory.

    Raises:
        InputError: another one does.
    """
    lock = FileLock(run.lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{run.path}: another lora-search run is writing to it") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(run: RunDirectory) -> bool:
    """Whether a process writes to the run directory now."""
    try:
        with locked(run):
            return False
    except InputError:
        return True
    except OSError:  # somebody else's, which we may only read
        return False


def find_run(run: str, output: Path = Path("runs")) -> RunDirectory:
    """The run directory at a path, or of that name under the output folder.

    Raises:
        InputError: there is none.
    """
    for path in (Path(run).expanduser(), output / run):
        if (path / "sweep.yaml").is_file():
            return RunDirectory(path)
    known = sorted(path.parent.name for path in output.glob("*/sweep.yaml"))
    there = f"{output} has {', '.join(known)}" if known else f"{output} has no runs"
    raise InputError(f"RUN: found {run!r}, which is neither a run directory nor the name of one; {there}")
