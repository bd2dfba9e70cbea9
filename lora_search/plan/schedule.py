"""How many steps a sweep takes, and how well they fill its hosts: simulated, many times over."""

from __future__ import annotations

import heapq
import random
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from lora_search.memory.corners import values
from lora_search.space import STARTUP_TRIALS, planned_trials, rungs
from lora_search.spec import SweepSpec

SIMULATED_TRIALS, LEAST_SWEEPS = 20_000, 10
"""So many trials in all, but so many sweeps at least: a tenth of a second, and a standard error of a percent."""

BEST_SHARE = 0.1
"""Of the trials, those that Optuna's TPE takes for good."""


@dataclass(frozen=True)
class Schedule:
    """A sweep's trials, in optimiser steps."""

    trials: int
    fewest: int
    """Steps where every trial is stopped at its first comparison."""
    expected: int
    """Mean over simulated sweeps, of a sampler that learns where the sweep's does."""
    low: int
    """One in twenty of the simulated sweeps takes fewer steps."""
    high: int
    """One in twenty takes more."""
    unlearned: int
    """Mean where no proposal is better than a random draw."""
    most: int
    """Steps where no trial is stopped."""
    reports: int
    """Evaluations expected."""
    seats: int
    """Trials that all hosts hold together."""
    efficiency: float
    """Share of the seats' time that is filled when each trial goes to whichever seat is free."""
    alone: float
    """Share of the whole time in which a single trial is left: the straggler."""


@dataclass(frozen=True)
class Course:
    """One simulated sweep."""

    lengths: list[int]
    """Steps of each trial, in the order of their start."""
    ends: list[int]
    """When a trial ended, ascending; a step takes 1."""

    @property
    def steps(self) -> int:
        return sum(self.lengths)

    @property
    def alone(self) -> int:
        """How long the last trial was the only one."""
        return self.ends[-1] - (self.ends[-2] if len(self.ends) > 1 else 0)


class Rung:
    """A number of steps at which trials are compared, by the rule of Ray Tune's AsyncHyperBandScheduler."""

    def __init__(self, factor: float) -> None:
        self._share = 1 - 1 / factor
        self._seen: list[float] = []

    def lets_on(self, quality: float) -> bool:
        """Whether a trial goes on: it is not below the percentile 1 - 1/factor of those that came here before it."""
        seen = self._seen
        on = True
        if seen:
            place = (len(seen) - 1) * self._share
            low = int(place)
            high = min(low + 1, len(seen) - 1)
            on = quality >= seen[low] + (place - low) * (seen[high] - seen[low])
        insort(seen, quality)
        return on


def schedule(spec: SweepSpec, seats: int) -> Schedule:
    """What ASHA leaves of a sweep, as its rule decides over trials of random quality.

    A trial's quality is one random number for all its rungs: who is better at one is better at the next. Of TPE it is
    assumed that it learns at once: when its random trials have ended, each proposal is a random draw from the best
    tenth of the space. All trials step at the same speed.
    """
    trials = planned_trials(spec)
    total = int(sum(map(int, values(spec, "steps"))) / len(values(spec, "steps")))  # the middle, where it is searched
    steps = [rung for rung in rungs(spec) if rung < total]
    factor = spec.search.scheduler.reduction_factor

    def courses(*, learning: bool) -> list[Course]:
        draw = random.Random(spec.search.sampler.seed)
        propose = partial(_proposal, draw, learning)
        many = range(max(LEAST_SWEEPS, SIMULATED_TRIALS // trials))
        return [simulate(trials, propose, steps, total, factor, seats) for _ in many]

    unlearned = courses(learning=False)
    found = courses(learning=True) if spec.search.sampler.name == "tpe" else unlearned
    ordered = sorted(course.steps for course in found)
    expected, duration = fmean(ordered), fmean(course.ends[-1] for course in found)
    return Schedule(
        trials=trials,
        fewest=trials * (steps[0] if steps else total),
        expected=round(expected),
        low=ordered[len(ordered) // 20],
        high=ordered[-1 - len(ordered) // 20],
        unlearned=round(fmean(course.steps for course in unlearned)),
        most=trials * total,
        reports=round(fmean(sum(report_count(spec, length) for length in course.lengths) for course in found)),
        seats=seats,
        efficiency=expected / (seats * duration),
        alone=fmean(course.alone for course in found) / duration if seats > 1 else 0.0,
    )


def simulate(
    trials: int, propose: Callable[[int], float], steps: Sequence[int], total: int, factor: float, seats: int
) -> Course:
    """Run trials over seats, each seat taking the next one when it is free, and compare them at the rungs.

    Args:
        propose: the quality of the next trial, the larger the better, where so many have ended.
        steps: of the rungs, ascending.
        total: steps of a trial that nothing stops.
    """
    compared = [Rung(factor) for _ in steps]
    stations = (*steps, total)
    started = min(seats, trials)
    qualities = [propose(0) for _ in range(started)]
    arrivals = [(stations[0], trial, 0) for trial in range(started)]
    lengths: list[int] = [0] * trials
    ends: list[int] = []
    while arrivals:
        now, trial, at = heapq.heappop(arrivals)
        if at < len(steps) and compared[at].lets_on(qualities[trial]):
            heapq.heappush(arrivals, (now + stations[at + 1] - stations[at], trial, at + 1))
            continue
        lengths[trial] = stations[at]
        ends.append(now)
        if started < trials:
            qualities.append(propose(len(ends)))
            heapq.heappush(arrivals, (now + stations[0], started, 0))
            started += 1
    return Course(lengths, ends)


def _proposal(draw: random.Random, learning: bool, ended: int) -> float:
    """A trial's quality: the share of the space that is worse."""
    quality = draw.random()
    return 1 - BEST_SHARE * (1 - quality) if learning and ended >= STARTUP_TRIALS else quality


def report_count(spec: SweepSpec, length: int) -> int:
    """How many of `report_steps` a trial of so many steps comes to, without listing them."""
    every = spec.training.eval_every
    others = {rung for rung in (*rungs(spec), length) if rung <= length and rung % every}
    return length // every + len(others)
