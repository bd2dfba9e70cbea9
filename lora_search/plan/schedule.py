"""How many steps a sweep takes, and how well they fill its hosts."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from lora_search.memory.corners import values
from lora_search.space import grid_size, rungs
from lora_search.spec import SweepSpec


@dataclass(frozen=True)
class Schedule:
    """A sweep's trials, in optimiser steps."""

    trials: int
    fewest: int
    """Steps where every trial is stopped at its first comparison."""
    expected: int
    most: int
    """Steps where no trial is stopped."""
    reports: int
    """Evaluations expected."""
    seats: int
    """Trials that all hosts hold together."""
    efficiency: float
    """Share of the seats' time that is filled when expected trials go to whichever seat is free."""
    alone: float
    """Share of the whole time in which a single trial is left: the straggler."""


def schedule(spec: SweepSpec, seats: int) -> Schedule:
    """What ASHA leaves of a sweep if, at each rung, as many go on as it says."""
    trials = spec.search.trials
    if spec.search.sampler.name == "grid":
        trials = min(trials, grid_size(spec.search.space))
    total = int(sum(map(int, values(spec, "steps"))) / len(values(spec, "steps")))  # the middle, where it is searched
    lengths = expected_lengths(trials, [rung for rung in rungs(spec) if rung < total], total, _factor(spec))
    efficiency, alone = fill(in_drawn_order(lengths, spec.search.sampler.seed), seats)
    return Schedule(
        trials=trials,
        fewest=trials * min(lengths),
        expected=sum(lengths),
        most=trials * total,
        reports=sum(_reports(spec, length) for length in lengths),
        seats=seats,
        efficiency=efficiency,
        alone=alone,
    )


def expected_lengths(trials: int, steps: Sequence[int], total: int, factor: float) -> list[int]:
    """Steps of each trial, ascending: 1 of `factor` goes on at each rung, rounded up."""
    lengths = []
    left = trials
    for rung in steps:
        on = math.ceil(left / factor)
        lengths += [rung] * (left - on)
        left = on
    return lengths + [total] * left


def in_drawn_order(lengths: Sequence[int], seed: int) -> list[int]:
    """Long and short trials as they come: nobody knows beforehand which will go on."""
    order = list(lengths)
    random.Random(seed).shuffle(order)
    return order


def fill(lengths: Sequence[int], seats: int) -> tuple[float, float]:
    """Give each trial to the seat that is free first.

    Returns:
        The share of the seats' time that is filled, and the share of the time in which one trial is left alone.
    """
    ends = [0] * seats
    finished = []
    for length in lengths:
        start = heapq.heappop(ends)
        heapq.heappush(ends, start + length)
        finished.append(start + length)
    finished.sort()
    last = finished[-1]
    before = finished[-2] if len(finished) > 1 else 0
    return sum(lengths) / (seats * last), (last - before) / last if seats > 1 else 0.0


def _factor(spec: SweepSpec) -> float:
    return spec.search.scheduler.reduction_factor


def _reports(spec: SweepSpec, length: int) -> int:
    regular = set(range(spec.training.eval_every, length + 1, spec.training.eval_every))
    return len(regular | {rung for rung in rungs(spec) if rung <= length} | {length})
