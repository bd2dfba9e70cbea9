"""Which trials are served, under which names, and their adapters out of the run's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_search.best import export_adapter, require_trial
from lora_search.checkpoint import require_lora, step_of
from lora_search.errors import InputError, SweepError
from lora_search.results import Row, best_row
from lora_search.rundir import RunDirectory
from lora_search.spec import SweepSpec

BASE = "base"
"""Name of the base without any adapter."""

BEST = "best"
"""Second name of the best trial's adapter."""


@dataclass(frozen=True)
class ServedAdapter:
    """A trial's adapter in PEFT's format."""

    name: str
    trial: int
    step: int
    """Optimiser steps behind its weights."""
    folder: Path
    row: Mapping[str, Any]
    """Of the trial, in the run's results."""


def choose_trials(spec: SweepSpec, rows: Sequence[Row], trials: str | None, top: int) -> list[int]:
    """The trials to serve, the best first.

    Args:
        trials: numbers with commas between them, or `best`; None: the best by their last reports.
        top: how many of the best.

    Raises:
        InputError: there is no such trial, or none has come to a result.
    """
    if trials is None:
        if top < 1:
            raise InputError(f"--top {top}: must be at least 1")
        left, chosen = list(rows), list[int]()
        while len(chosen) < top and (best := best_row(left, spec.search.metric, spec.search.mode)):
            chosen.append(int(best["trial"]))
            left = [row for row in left if row["trial"] != best["trial"]]
        if not chosen:
            raise InputError("--top: no trial of this run has come to a result yet")
        return chosen
    chosen = []
    for part in trials.split(","):
        name = part.strip()
        best = best_row(rows, spec.search.metric, spec.search.mode) if name == BEST else None
        if best is None and not (name.isascii() and name.isdigit()):
            why = "no trial has come to a result" if name == BEST else "must be trials' numbers with commas between"
            raise InputError(f"--trials {trials}: {why}")
        chosen.append(int(require_trial(list(rows), int(best["trial"] if best else name))["trial"]))
    return list(dict.fromkeys(chosen))


def collect_adapters(
    run: RunDirectory, rows: Sequence[Row], trials: Sequence[int], folder: Path
) -> tuple[list[ServedAdapter], list[str]]:
    """The adapters of trials, each out of its last checkpoint, below `folder`, and why others are left out.

    Raises:
        InputError: not one of the trials has an adapter that can be used.
    """
    adapters, left_out = [], []
    for trial in trials:
        place = folder / trial_name(trial)
        try:
            checkpoint = export_adapter(run, trial, place)
            require_lora(place)
        except SweepError as error:
            left_out.append(str(error))
            continue
        row = require_trial(list(rows), trial)
        adapters.append(ServedAdapter(trial_name(trial), trial, step_of(checkpoint), place, row))
    if not adapters:
        raise InputError("\n".join(left_out))
    return adapters, left_out


def trial_name(trial: int) -> str:
    """What a trial's adapter is called: as PEFT allows, without a dot."""
    return f"trial-{trial}"
