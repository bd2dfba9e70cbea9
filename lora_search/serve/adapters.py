"""The adapters that are served, under which names, out of the run's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_search.best import export_adapter
from lora_search.checkpoint import require_lora, step_of
from lora_search.errors import InputError, SweepError
from lora_search.results import Row
from lora_search.rundir import RunDirectory

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


def collect_adapters(run: RunDirectory, rows: Sequence[Row], folder: Path) -> tuple[list[ServedAdapter], list[str]]:
    """The adapters of the trials with these rows, each out of its last checkpoint, and why others are left out.

    They lie below `folder`.

    Raises:
        InputError: not one of the trials has an adapter that can be used.
    """
    adapters, left_out = [], []
    for row in rows:
        trial = int(row["trial"])
        place = folder / trial_name(trial)
        try:
            checkpoint = export_adapter(run, trial, place)
            require_lora(place)
        except SweepError as error:
            left_out.append(str(error))
            continue
        adapters.append(ServedAdapter(trial_name(trial), trial, step_of(checkpoint), place, row))
    if not adapters:
        raise InputError("\n".join(left_out))
    return adapters, left_out


def trial_name(trial: int) -> str:
    """What a trial's adapter is called: as PEFT allows, without a dot."""
    return f"trial-{trial}"
