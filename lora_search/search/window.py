"""A sampler that looks at a bounded part of a long study, so that a proposal costs the same however many there were."""

from __future__ import annotations

import heapq
from collections.abc import Container, Mapping
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

NEWEST, BEST = 400, 100

LEARNT_FROM = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
"""Others take no place among the newest."""


class Window(BaseSampler):
    """Another sampler, which sees no more of a study than its newest trials and its best."""

    def __init__(
        self, sampler: BaseSampler, space: Mapping[str, BaseDistribution], newest: int = NEWEST, best: int = BEST
    ) -> None:
        """
        Args:
            space: all that is searched, of which every trial has a value.
        """
        self._sampler = sampler
        self._space = {name: space[name] for name in sorted(space) if not space[name].single()}
        self._newest = newest
        self._best = best
        self._seen_for: tuple[int, _Seen] | None = None
        """By the number of the trial that is proposed."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All of the space, as it would be found by a look at what every trial has."""
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(self._seen(study, trial), trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(self._seen(study, trial), trial, param_name, param_distribution)

    def _seen(self, study: Study, trial: FrozenTrial) -> Any:
        if self._seen_for is None or self._seen_for[0] != trial.number:
            self._seen_for = trial.number, _Seen(study, trial, self._newest, self._best)
        return self._seen_for[1]


class _Seen:
    """A study without most of its old trials and the one that is proposed, as it was at the proposal's beginning."""

    def __init__(self, study: Study, proposed: FrozenTrial, newest: int, best: int) -> None:
        self._study = study
        there = study._get_trials(deepcopy=False, states=LEARNT_FROM)
        trials = [trial for trial in there if trial.number != proposed.number]
        if len(trials) > newest + best:
            sign = 1.0 if study.direction.name == "MINIMIZE" else -1.0
            completed = [trial for trial in trials[:-newest] if trial.state == TrialState.COMPLETE]
            chosen = heapq.nsmallest(best, completed, key=lambda trial: sign * (trial.value or 0.0))
            trials = sorted(chosen, key=lambda trial: trial.number) + trials[-newest:]
        self._trials = trials

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        """By this method samplers ask for trials; TPE never for copies of them."""
        return [trial for trial in self._trials if states is None or trial.state in states]
