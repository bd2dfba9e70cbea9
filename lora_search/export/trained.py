"""What was trained: a trial's configuration, how far it came, and what it reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from lora_search.errors import InputError, SweepError
from lora_search.results import PLANNED, Row, sampled
from lora_search.rundir import RunDirectory
from lora_search.space import TrialConfig, trial_config
from lora_search.spec import SweepSpec
from lora_search.spec.schema import plain_reason


@dataclass(frozen=True)
class Trained:
    """One trial of a run, as its rows of results tell it."""

    run: RunDirectory
    spec: SweepSpec
    rows: Sequence[Row]
    """Of all trials of the run."""
    row: Row
    config: TrialConfig

    @property
    def trial(self) -> int:
        return int(self.row["trial"])

    @property
    def steps(self) -> int:
        """Optimiser steps behind the figures reported last."""
        return int(self.row["steps"])

    @property
    def planned_steps(self) -> int:
        """Optimiser steps that the learning-rate schedule spans."""
        return self.config.training.steps

    @property
    def stopped_early(self) -> bool:
        return self.steps < self.planned_steps

    @property
    def warmup_steps(self) -> int:
        """As the engine counts them."""
        return math.ceil(self.planned_steps * self.config.training.warmup_ratio)

    @property
    def rows_per_step(self) -> int:
        """The effective batch: rows of the data set that an optimiser step reads."""
        return self.config.training.batch_size * self.config.training.gradient_accumulation_steps

    @property
    def alpha(self) -> float | int:
        """A whole number where it is one, as most tools ask for."""
        return int(self.config.alpha) if float(self.config.alpha).is_integer() else self.config.alpha

    @property
    def eval_loss(self) -> float | None:
        """Nats a target token of the validation split; None where the trial has not reported it."""
        return self.row.get("eval_loss")

    def sampled(self) -> dict[str, Any]:
        """The values of the searched parameters."""
        return sampled(self.row, self.spec.search.space)


def describe(run: RunDirectory, spec: SweepSpec, rows: Sequence[Row], row: Row) -> Trained:
    """What a row of results says was trained.

    Raises:
        InputError: the trial has not reported yet, so that there is nothing to train again.
        SweepError: the row does not fit the run's sweep file.
    """
    if not row["steps"]:
        raise InputError(f"--trial {row['trial']}: has reported no step yet; {run.place} has it as {row['state']}")
    values = sampled(row, spec.search.space)
    missing = [name for name in spec.search.space if name not in values]
    if missing:
        raise SweepError(f"{run.trials}: trial {row['trial']} has no {', '.join(missing)}, which {run.spec} searches")
    try:
        planned = {"steps": row[PLANNED]} if row.get(PLANNED) else {}  # the sweep file's are another resumption's
        config = trial_config(spec, planned | values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise SweepError(
            f"{run.trials}: trial {row['trial']}: {key}: found {str(first['input'])[:80]!r}; "
            f"{plain_reason(first['msg'])}"
        ) from None
    if row["steps"] > config.training.steps:
        raise SweepError(
            f"{run.trials}: trial {row['trial']}: found {row['steps']} steps of at most {config.training.steps}"
        )
    return Trained(run, spec, rows, row, config)
