"""Trials compared at the same step: what was stopped early is only comparable there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_search.results import Row

FEWEST = 5

MOST_STEPS = 12
"""To choose from."""


def compared_steps(
    rows: Sequence[Row], curves: Mapping[int, Sequence[tuple[int, float]]], rungs: Sequence[int]
) -> list[tuple[int, int]]:
    """Steps at which at least two trials reported, and how many did: the rungs and the last, or evenly chosen ones."""
    counts: dict[int, int] = {}
    for curve in curves.values():
        for step, _ in curve:
            counts[step] = counts.get(step, 0) + 1
    known = sorted(step for step, count in counts.items() if count >= 2)
    chosen = [step for step in known if step in rungs or step == known[-1]]
    if len(chosen) < 3:
        stride = -(-len(known) // MOST_STEPS) or 1
        chosen = sorted({*chosen, *known[::stride]})
    return [(step, counts[step]) for step in chosen[:MOST_STEPS]]


def usual_step(steps: Sequence[tuple[int, int]], trials: int) -> int | None:
    """The latest step that a third of the trials reached, and five: late enough to tell, and with enough to see."""
    enough = [step for step, count in steps if count >= max(FEWEST, trials / 3)]
    return enough[-1] if enough else steps[0][0] if steps else None
