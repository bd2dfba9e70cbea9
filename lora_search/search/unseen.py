"""A sampler for a finite space that proposes no configuration twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

DRAWS = 20
"""Of the other sampler, before one of what is left is taken by chance: by then it has little else to say."""


class Unseen(BaseSampler):
    """Another sampler, asked again while it proposes what the study has already."""

    def __init__(
        self,
        sampler: BaseSampler,
        space: Mapping[str, BaseDistribution],
        configurations: Iterable[dict[str, Any]],
        seed: int,
    ) -> None:
        """
        Args:
            space: all that is searched.
            configurations: all that there are; looked at once at most.
        """
        self._sampler = sampler
        self._space = dict(space)
        self._configurations = configurations
        self._random = np.random.default_rng(seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All of the space, so that a whole configuration is drawn at once."""
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        fixed: dict[str, Any] = trial.system_attrs.get("fixed_params", {})
        others = study._get_trials(deepcopy=False, use_cache=True)
        seen = {_key(_params(other)) for other in others if other.number != trial.number}
        found: dict[str, Any] = {}
        for _ in range(DRAWS):
            found = self._draw(study, trial) | fixed
            if _key(found) not in seen:
                return found
        fitting = (c for c in self._configurations if fixed.items() <= c.items())
        left = [configuration for configuration in fitting if _key(configuration) not in seen]
        return left[self._random.integers(len(left))] if left else found

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def _draw(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        related = self._sampler.infer_relative_search_space(study, trial)
        found = self._sampler.sample_relative(study, trial, related)
        for name, distribution in self._space.items():
            if name not in found:
                found[name] = self._sampler.sample_independent(study, trial, name, distribution)
        return found


def _params(trial: FrozenTrial) -> dict[str, Any]:
    """Of a trial that waits, what it is to have."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def _key(configuration: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    return frozenset(configuration.items())
