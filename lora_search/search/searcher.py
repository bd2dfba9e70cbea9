"""The searcher: one Optuna trial for each Ray Tune trial, told the truth about how it ended.

Ray's own OptunaSearch tells the study COMPLETE, with a low rung's value, for a trial that the scheduler stopped. Here
such a trial is PRUNED with its intermediate values, which is what TPE ranks by the step reached.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from lora_search.errors import OUT_OF_MEMORY
from lora_search.search.study import decode, distributions
from lora_search.spec import SweepSpec

MEMORY = "memory"
"""Optuna's constraint: above zero where a trial alone is too large for its device."""


class StudySearcher(Searcher):  # type: ignore[misc]  # Ray's base class is untyped
    """Proposes configurations from a study: `{"trial": number, "params": {name: value}}`."""

    def __init__(self, spec: SweepSpec, study: optuna.Study) -> None:
        super().__init__(metric=spec.search.metric, mode=spec.search.mode)
        self._space = spec.search.space
        self._distributions = distributions(self._space)
        self._study = study
        self._trials: dict[str, optuna.Trial] = {}
        self._failed: dict[int, optuna.Trial] = {}
        """Not told yet: Tune says that a trial failed before it says why."""
        self._reported: dict[int, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        trial = self._study.ask(self._distributions)
        self._trials[trial_id] = trial
        return {"trial": trial.number, "params": decode(self._space, trial.params)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._report(self._trials[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study COMPLETE for a trial trained to its last step, PRUNED for a stopped one.

        A failed one is told as soon as it is known why: see `explain_failure`.
        """
        trial = self._trials.pop(trial_id, None)
        if trial is None:
            return
        if error or not result or self.metric not in result:
            self._failed[trial.number] = trial
            return
        self._report(trial, result)
        if result["step"] >= result["steps_total"]:
            self._study.tell(trial, result[self.metric])
        else:
            self._study.tell(trial, state=TrialState.PRUNED)

    def explain_failure(self, number: int, reason: str | None) -> None:
        """Tell the study of a failed trial: FAIL; but of one too large for its device, that it is infeasible.

        TPE does not look at failed trials. What it avoids is a trial that violates a constraint, PRUNED.
        """
        trial = self._failed.pop(number, None)
        if trial is None:
            return
        if reason is not None and reason.startswith(OUT_OF_MEMORY):
            trial.set_constraint(MEMORY, 1.0)
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, state=TrialState.FAIL)

    def close(self) -> None:
        """Tell FAIL of every failed trial that nobody has explained."""
        for number in list(self._failed):
            self.explain_failure(number, None)

    def _report(self, trial: optuna.Trial, result: dict[str, Any]) -> None:
        step = int(result["step"])
        if self._reported.get(trial.number, 0) < step:  # Tune may hand over a trial's last result twice
            trial.report(float(result[self.metric]), step)
            self._reported[trial.number] = step

    def save(self, checkpoint_path: str) -> None:
        """Which Tune trial stands for which of the study's; the study itself is on disk already."""
        numbers = {trial_id: trial.number for trial_id, trial in self._trials.items()}
        Path(checkpoint_path).write_text(json.dumps(numbers), encoding="utf-8")
