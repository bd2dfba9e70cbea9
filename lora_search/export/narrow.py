"""A search space narrowed around the best trials, in W&B's terms.

The best quarter of the trials that have a result, but at least 3, say where it is worth going on: a range becomes what
these trials span, widened by a quarter of that on both sides (on a log scale for a log-uniform range) and cut at the
old bounds; a choice keeps the values that occur among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lora_search.results import Row, ranked_rows, sampled
from lora_search.spec import Choice, Domain, Fixed, IntUniform, LogUniform

SHARE = 4
"""One trial of so many is among the best."""

FEWEST = 3


def best_quarter(rows: Sequence[Row], metric: str, mode: Literal["min", "max"]) -> list[Row]:
    """The best trials of those that have ended with a result, the best first."""
    ranked = ranked_rows(rows, metric, mode)
    return ranked[: max(FEWEST, len(ranked) // SHARE)]


def narrowed(space: Mapping[str, Domain], best: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """W&B's `parameters` of a space around these trials."""
    values = [sampled(row, space) for row in best]
    return {name: _parameter(domain, [value[name] for value in values]) for name, domain in space.items()}


def word(value: Any) -> Any:
    """A value as the program's argument: a list of module names is one word."""
    return ",".join(value) if isinstance(value, list) else value


def _parameter(domain: Domain, found: list[Any]) -> dict[str, Any]:
    match domain:
        case Fixed(value):
            return {"value": word(value)}
        case Choice(values):
            kept = [word(value) for value in values if value in found]
            return {"values": kept} if len(kept) > 1 else {"value": kept[0]}
        case IntUniform(low, high):
            span = max(found) - min(found)
            bounds = math.floor(min(found) - span / 4), math.ceil(max(found) + span / 4)
            return _range("int_uniform", max(low, bounds[0]), min(high, bounds[1]))
        case LogUniform(low, high):
            near, far = math.log(min(found)), math.log(max(found))
            margin = (far - near) / 4
            return _range("log_uniform_values", max(low, math.exp(near - margin)), min(high, math.exp(far + margin)))
        case _:
            low, high = domain.probes()
            margin = (max(found) - min(found)) / 4
            return _range("uniform", max(low, min(found) - margin), min(high, max(found) + margin))


def _range(distribution: str, low: float, high: float) -> dict[str, Any]:
    return {"value": low} if low == high else {"distribution": distribution, "min": low, "max": high}
