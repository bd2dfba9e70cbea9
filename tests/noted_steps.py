"""Hosts whose engines are real, and note every step that they make; and the command, with such hosts.

`python noted_steps.py run SWEEP.yaml` is `lora-search run SWEEP.yaml`, but for the notes.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lora_search.checkpoint import TRIAL
from lora_search.rundir import RunDirectory
from lora_search.sweep.build import build_engine

if TYPE_CHECKING:
    from lora_search.engine import Engine
    from lora_search.placement import HostPlace
    from lora_search.spec import SweepSpec

NOTES = "steps"
"""The file in a sweep's output: a line a step, with trial and step, in the order in which they were made."""


def build_noting(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> Engine:
    """The engine of a host, which notes the steps that it makes."""
    engine: Any = build_engine(spec, place, capacity, data)
    step = engine.step
    notes = os.open(Path(spec.output) / NOTES, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(trials: Sequence[str]) -> Any:
        outcomes = step(trials)
        os.write(notes, "".join(f"{trial} {engine.position(trial)}\n" for trial in trials).encode())
        return outcomes

    engine.step = noted
    return cast("Engine", engine)


def noted(output: Path) -> list[tuple[int, int]]:
    """Trial and step of each that was made, in order; not those that the best trial makes again at the sweep's end."""
    notes = output / NOTES
    lines = notes.read_text().splitlines() if notes.exists() else []
    return [(int(trial), int(step)) for trial, step in map(str.split, lines) if trial.isdigit()]


def steps_made(output: Path) -> Counter[tuple[int, int]]:
    """How often each step of each trial was made."""
    return Counter(noted(output))


def repeated(output: Path) -> int:
    return sum(count - 1 for count in steps_made(output).values())


def jumps_back(output: Path) -> list[tuple[int, int, int]]:
    """Where trials went on: trial, the last step that it had made, and the next one, where that was no later."""
    last: dict[int, int] = {}
    found = []
    for trial, step in noted(output):
        if step <= last.get(trial, 0):
            found.append((trial, last[trial], step))
        last[trial] = step
    return found


def saved_steps(run: RunDirectory) -> dict[int, list[int]]:
    """The steps of the checkpoints that a run directory holds, by trial."""
    found: dict[int, list[int]] = {}
    for seal in sorted(run.tune.glob(f"trial-*/checkpoint_*/{TRIAL}")):
        found.setdefault(int(seal.parts[-3].removeprefix("trial-")), []).append(json.loads(seal.read_text())["step"])
    return found


def drive() -> None:
    """The command, with engines that note what they do."""
    import ray

    from lora_search.cli.main import main
    from lora_search.sweep import run

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # hosts do not find this file
    run.build_engine = build_noting
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    drive()
