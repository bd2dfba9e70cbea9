"""A sampler that looks at a bounded part of a long study, so that a proposal costs the same however many there were."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

NEWEST, BEST = 900, 100


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

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All of the space, as it would be found by a look at what every trial has."""
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(self._seen(study), trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(self._seen(study), trial, param_name, param_distribution)

    def _seen(self, study: Study) -> Any:
        return _Seen(study, self._newest, self._best)


class _Seen:
    """A study without most of its old trials."""

    def __init__(self, study: Study, newest: int, best: int) -> None:
        self._study = study
        self._newest = newest
        self._best = best

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self, deepcopy: bool = True, states: Sequence[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        """By this method samplers ask for trials."""
        trials = self._study._get_trials(deepcopy, tuple(states) if states is not None else None, use_cache)
        if len(trials) <= self._newest + self._best:
            return trials
        old, new = trials[: -self._newest], trials[-self._newest :]
        sign = 1.0 if self._study.direction.name == "MINIMIZE" else -1.0
        completed = [trial for trial in old if trial.state == TrialState.COMPLETE and trial.value is not None]
        best = heapq.nsmallest(self._best, completed, key=lambda trial: sign * (trial.value or 0.0))
        return sorted(best, key=lambda trial: trial.number) + new
