"""What happens to the trials of a sweep, told to whoever records or shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

State = Literal["running", "completed", "stopped", "failed"]
"""completed: trained to its last step. stopped: ended early by the scheduler. failed: for a reason of its own."""


class Observer:
    """Is told of every event, in order, from one thread. Does nothing unless a method is overridden.

    `parameters` are a trial's hyperparameters by name (rank, alpha, dropout, target_modules, learning_rate and
    whatever else is searched). A `report` is `engine.Report` as a dict, with `host`.
    """

    essential = False
    """Whether the sweep must end where this observer fails; any other is only told no more."""

    def past(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The trials that earlier processes have run, where the sweep is resumed. Told before anything else."""

    def trial_started(self, trial: int, parameters: Mapping[str, Any]) -> None:
        """A trial begins."""

    def trial_resumed(self, trial: int, parameters: Mapping[str, Any], step: int, damaged: Sequence[str]) -> None:
        """A trial goes on from its checkpoint of a step, 0 where it has none, after its seat or the sweep was lost.

        Args:
            damaged: what is wrong with later checkpoints of it.
        """

    def trial_reported(self, trial: int, report: Mapping[str, Any]) -> None:
        """A trial was evaluated."""

    def trial_saved(self, trial: int, step: int, path: str) -> None:
        """A trial's checkpoint is complete, in a folder relative to the run directory."""

    def trial_ended(self, trial: int, state: State, reason: str | None) -> None:
        """A trial is over; `reason` says why it failed."""

    def tick(self) -> None:
        """Called many times a second while the sweep runs."""

    def concluded(self, rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any], adapter: Path) -> None:
        """The sweep has its result: all trials' rows, the best one, and the folder of its adapter."""

    def close(self) -> None:
        """Nothing more will be heard, whether the sweep came to its end or not."""
