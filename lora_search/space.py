"""The search space as values: a trial's configuration, the steps at which it reports, what to try first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_search.spec import LORA_KEYS, Choice, Domain, Fixed, IntUniform, SweepSpec
from lora_search.spec.schema import Lora, Training

FIRST_GUESS = {"rank": 16, "alpha": 32.0, "alpha_ratio": 2.0, "dropout": 0.05}
"""The common start of the LoRA guides: rank 16, alpha twice the rank, a little dropout."""

STARTUP_TRIALS = 10
"""Random trials before TPE models anything; Optuna's own default."""


@dataclass(frozen=True)
class TrialConfig:
    """One sampled configuration: what is adapted, and how it is trained."""

    lora: Lora
    training: Training

    @property
    def alpha(self) -> float:
        """The scaling's numerator, given itself or as a multiple of the rank."""
        return self.lora.alpha if self.lora.alpha is not None else self.lora.alpha_ratio * self.lora.rank

    @property
    def scaling(self) -> float:
        """The factor on B A x: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732)."""
        return self.alpha / (self.lora.rank**0.5 if self.lora.use_rslora else self.lora.rank)

    def parameters(self) -> dict[str, Any]:
        """What a row of results shows of every trial, whether searched or not."""
        return {
            "rank": self.lora.rank,
            "alpha": self.alpha,
            "dropout": self.lora.dropout,
            "target_modules": self.lora.target_modules,
            "learning_rate": self.training.learning_rate,
        }


def trial_config(spec: SweepSpec, sampled: Mapping[str, Any]) -> TrialConfig:
    """The configuration of a trial: the sampled values, over `training`, over the defaults."""
    lora = {key: value for key, value in sampled.items() if key in LORA_KEYS}
    training = {key: value for key, value in sampled.items() if key not in LORA_KEYS}
    return TrialConfig(
        lora=Lora.model_validate(lora),
        training=Training.model_validate(spec.training.model_dump() | training),
    )


def rungs(spec: SweepSpec) -> tuple[int, ...]:
    """The steps at which ASHA compares trials, ascending: first_rung * reduction_factor^k, below the full budget.

    Rounded up where they are fractions: Ray compares what has reached a rung.
    """
    scheduler = spec.search.scheduler
    if scheduler.name == "none":
        return ()
    rung = float(first_rung(spec))
    steps = []
    while rung < spec.max_steps:
        steps.append(math.ceil(rung))
        rung *= scheduler.reduction_factor
    return tuple(steps)


def first_rung(spec: SweepSpec) -> int:
    """The first comparison's step: as the sweep file says, else the first evaluation."""
    return min(spec.search.scheduler.first_rung or spec.training.eval_every, spec.max_steps)


def report_steps(spec: SweepSpec, config: TrialConfig) -> tuple[int, ...]:
    """The steps at which a trial is evaluated, checkpointed and reported: each eval_every, each rung, and the last."""
    total = config.training.steps
    regular = range(config.training.eval_every, total + 1, config.training.eval_every)
    return tuple(sorted({*regular, *(rung for rung in rungs(spec) if rung < total), total}))


def first_trials(spec: SweepSpec) -> list[dict[str, Any]]:
    """The configurations to try before the sampler's own; the common first guess unless the sweep file names some."""
    if spec.search.enqueue is not None:
        return [dict(configuration) for configuration in spec.search.enqueue]
    guess = {
        name: value
        for name, value in FIRST_GUESS.items()
        if name in spec.search.space and spec.search.space[name].contains(value)
    }
    return [guess] if guess else []


def planned_trials(spec: SweepSpec) -> int:
    """How many trials a sweep has: as many as the sweep file says, but no more than a finite space has configurations.

    The same configuration again would come to the same result.
    """
    return min(spec.search.trials, grid_size(spec.search.space)) if is_finite(spec.search.space) else spec.search.trials


def is_finite(space: Mapping[str, Domain]) -> bool:
    """Whether a space has only so many configurations."""
    return all(isinstance(domain, Choice | Fixed | IntUniform) for domain in space.values())


def grid_of(space: Mapping[str, Domain]) -> Iterator[dict[str, Any]]:
    """All configurations of a finite space."""
    values = [
        range(domain.low, domain.high + 1) if isinstance(domain, IntUniform) else domain.probes()
        for domain in space.values()
    ]
    for combination in itertools.product(*values):
        yield dict(zip(space, combination, strict=True))


def grid_size(space: Mapping[str, Domain]) -> int:
    """How many configurations a space of finite domains has."""
    size = 1
    for domain in space.values():
        if isinstance(domain, Choice):
            size *= len(domain.values)
        elif not isinstance(domain, Fixed):
            low, high = domain.probes()
            size *= high - low + 1
    return size
