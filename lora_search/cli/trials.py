"""Which trials of a run a command is about."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_search.errors import InputError
from lora_search.results import Row, best_row
from lora_search.rundir import RunDirectory
from lora_search.spec import SweepSpec


def chosen_trials(asked: str, rows: Sequence[Row], spec: SweepSpec, run: RunDirectory) -> list[int]:
    """The numbers that `--trials A,B,...` or `--trials topK` names, at least two.

    Raises:
        InputError: it is neither, one stands there twice, or there is no such trial.
    """
    option = f"--trials {asked}"
    if match := re.fullmatch(r"top(\d+)", asked):
        numbers = _ranked(option, rows, spec, run, int(match[1]))
    elif re.fullmatch(r"\d+(,\d+)*", asked):
        numbers = [int(number) for number in asked.split(",")]
    else:
        raise InputError(f"{option}: must be trials' numbers with commas between them, or topK such as top3")
    if len(numbers) < 2 or len(set(numbers)) < len(numbers):
        raise InputError(f"{option}: must name at least two trials, each once")
    for number in numbers:
        _require(option, number, rows)
    return numbers


def _ranked(option: str, rows: Sequence[Row], spec: SweepSpec, run: RunDirectory, count: int) -> list[int]:
    """The best trials, best first."""
    left, numbers = list(rows), list[int]()
    for _ in range(count):
        best = best_row(left, spec.search.metric, spec.search.mode)
        if best is None:
            some = f"only {len(numbers)} trials" if numbers else "no trial"
            raise InputError(f"{option}: {some} of {run.place} has come to a result")
        numbers.append(int(best["trial"]))
        left = [row for row in left if row["trial"] != best["trial"]]
    return numbers


def _require(option: str, number: int, rows: Sequence[Row]) -> None:
    if not any(row["trial"] == number for row in rows):
        raise InputError(f"{option}: no such trial; the run has {len(rows)}, numbered from 0")
