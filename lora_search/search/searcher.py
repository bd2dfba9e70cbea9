"""The searcher: one Optuna trial for each Ray Tune trial, told the truth about how it ended.

Ray's own OptunaSearch tells the study COMPLETE, with a low rung's value, for a trial that the scheduler stopped. Here
such a trial is PRUNED with its intermediate values, which is what TPE ranks by the step reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from lora_search.errors import OUT_OF_MEMORY
from lora_search.search.study import decode, distributions, sampler
from lora_search.space import planned_trials
from lora_search.spec import SweepSpec

MEMORY = "memory"
"""Optuna's constraint: above zero where a trial alone is too large for its device."""


class StudySearcher(Searcher):  # type: ignore[misc]  # Ray's base class is untyped
    """Proposes configurations from a study: a trial's number and params, and `attempt`, `again` and `alone`.

    Trials that the study has as running, from an earlier process, come first, with their numbers and `again` set. So
    does one whose seat, host or machine was lost: Ray Tune's own retries do not reach a trial that was lost before its
    first step. On its last try it is to be alone among those that have not reported: where a trial ends its hosts,
    those beside it are not given up with it. Each proposal is drawn from the sampler's seed and the trial's number, so
    that a search goes on as if it had not been interrupted.
    """

    def __init__(
        self,
        spec: SweepSpec,
        study: optuna.Study,
        capacity: Callable[[], int],
        excuses: Callable[[int], bool] = lambda trial: False,
    ) -> None:
        """
        Args:
            capacity: trials that may run at once, as it stands when a trial is asked for.
            excuses: whether the loss of a trial is not to be held against it; asked once for each.
        """
        super().__init__(metric=spec.search.metric, mode=spec.search.mode)
        self._search = spec.search
        self._planned = planned_trials(spec)
        self._max_retries = spec.hosts.max_retries
        self._distributions = distributions(spec.search.space)
        self._study = study
        self._capacity = capacity
        self._excuses = excuses
        trials = study.get_trials(deepcopy=False)
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        self._waiting = [optuna.Trial(study, trial._trial_id) for trial in running]
        """Have been proposed, and are not with Ray Tune."""
        self._losses: Counter[int] = Counter()
        """Of a trial, since it last reported."""
        self._attempts: Counter[int] = Counter()
        """Of a trial, how often it was proposed."""
        self._asked = sum(trial.state != TrialState.WAITING for trial in trials)
        self._trials: dict[str, optuna.Trial] = {}
        self._reported = {trial.number: max(trial.intermediate_values, default=0) for trial in running}

    @property
    def exhausted(self) -> bool:
        """Whether no trial is to come, as it stands."""
        return not self._waiting and self._asked >= self._planned

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """A configuration; None while as many trials run as may, FINISHED when all have ended."""
        if len(self._trials) >= self._capacity():
            return None
        if again := bool(self._waiting):
            trial = self._waiting.pop(0)
            if trial.params.keys() != self._distributions.keys():
                self._propose_the_rest(trial)
        elif self._asked < self._planned:
            self._study.sampler = sampler(self._search, self._asked)
            trial = self._study.ask(self._distributions)
            self._asked += 1
        else:
            return None if self._trials else str(Searcher.FINISHED)
        self._trials[trial_id] = trial
        alone = self._losses[trial.number] >= max(1, self._max_retries)
        params = decode(self._search.space, trial.params)
        attempt = self._attempts[trial.number]
        self._attempts[trial.number] += 1
        return {"trial": trial.number, "params": params, "attempt": attempt, "again": again, "alone": alone}

    def _propose_the_rest(self, trial: optuna.Trial) -> None:
        """Finish the last proposal of a process that was ended in the middle of it, as that would have."""
        self._study.sampler = sampler(self._search, self._asked - 1)
        together = trial.relative_params
        for name, distribution in self._distributions.items():
            sampled = name not in together and not distribution.single()
            if name in trial.params and sampled and not trial._is_fixed_param(name, distribution):
                frozen = self._study.get_trials(deepcopy=False)[trial.number]
                self._study.sampler.sample_independent(self._study, frozen, name, distribution)  # was drawn before
            trial._suggest(name, distribution)

    def retries(self, number: int) -> bool:
        """Whether a trial that was lost is to be proposed again."""
        return any(trial.number == number for trial in self._waiting)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self.metric in result:
            self._report(self._trials[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study COMPLETE for a trial trained to its last step, PRUNED for a stopped one, else FAIL.

        One too large for its device is infeasible. TPE does not look at failed trials; what it avoids is a trial that
        violates a constraint, PRUNED.
        """
        trial = self._trials.pop(trial_id, None)
        if trial is None:
            return
        if error:  # what is a trial's own fault comes as a result
            self._losses[trial.number] += not self._excuses(trial.number)
            if self._losses[trial.number] <= self._max_retries:
                self._waiting.append(trial)
                return
        failure = (result or {}).get("failure")
        if failure is not None and failure.startswith(OUT_OF_MEMORY):
            trial.set_constraint(MEMORY, 1.0)
            self._study.tell(trial, state=TrialState.PRUNED)
        elif error or not result or self.metric not in result:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._report(trial, result)
            if result["step"] >= result["steps_total"]:
                self._study.tell(trial, result[self.metric])
            else:
                self._study.tell(trial, state=TrialState.PRUNED)

    def _report(self, trial: optuna.Trial, result: dict[str, Any]) -> None:
        """A result may come twice: Tune hands over a trial's last one again, and so does a trial that goes on."""
        step = int(result["step"])
        if self._reported.get(trial.number, 0) < step:
            trial.report(float(result[self.metric]), step)
            self._losses.pop(trial.number, None)
            self._reported[trial.number] = step

    def save(self, checkpoint_path: str) -> None:
        """The study is on disk already."""
