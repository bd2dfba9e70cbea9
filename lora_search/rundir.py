"""The run directory: where each file of a sweep lies. Knows paths, and nothing of what is in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
