"""What the trials suggest to try next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from lora_search.report.standing import leaders
from lora_search.report.values import number, text
from lora_search.results import Row, column
from lora_search.spec import Choice, Fixed, LogUniform, SweepSpec

EDGE = 0.05
"""So near to the end of a range, as a share of it, lies at its end."""

STILL_FALLS = 0.01
"""A relative improvement over the last tenth of the steps that says that training had not ended."""


def advice(
    spec: SweepSpec, standing: Sequence[Row], curves: Mapping[int, Sequence[tuple[int, float]]], planned: int
) -> list[str]:
    """Sentences, each with what was found and what to do about it; none where there is no reason for any."""
    found: list[str] = []
    best = leaders(standing)
    if len(best) >= 3:
        improving = [row for row in best if _improves(curves.get(row["trial"], ()), spec.search.mode)]
        for name in spec.search.space:
            end = _at_the_end(spec, name, best)
            if end is not None:
                found.append(_sentence(name, end, best, len(improving) == len(best)))
        if len(improving) == len(best):
            found.append(
                f"The best {len(best)} trials were still improving at their last steps: more training.steps may help."
            )
    if planned < spec.search.trials:
        found.append(f"The space holds {planned} configurations, fewer than search.trials asks for.")
    return found


def _at_the_end(spec: SweepSpec, name: str, best: Sequence[Row]) -> Literal["top", "bottom"] | None:
    """At which end of a parameter's range all of the best trials lie; None where they do not."""
    domain = spec.search.space[name]
    if isinstance(domain, Fixed):
        return None
    ends = [number(value) for value in domain.probes()]
    values = [number(row.get(column(name))) for row in best]
    if any(value is None for value in ends) or any(value is None for value in values):
        return None
    low, high = min(value for value in ends if value is not None), max(value for value in ends if value is not None)
    if low >= high or (isinstance(domain, Choice) and len(domain.values) < 3):
        return None

    def place(value: float) -> float:
        if isinstance(domain, LogUniform):
            return math.log(value / low) / math.log(high / low) if value > 0 else 0.0
        return (value - low) / (high - low)

    places = [place(value) for value in values if value is not None]
    margin = 0.0 if isinstance(domain, Choice) else EDGE
    if all(place >= 1 - margin for place in places):
        return "top"
    if all(place <= margin for place in places):
        return "bottom" if low > 0 else None  # dropout 0 and weight decay 0 have nothing below them
    return None


def _sentence(name: str, end: str, best: Sequence[Row], improving: bool) -> str:
    values = sorted({row[column(name)] for row in best})
    where = f"{name} at the {end} of its range ({' to '.join(map(text, dict.fromkeys((values[0], values[-1]))))})"
    line = f"The best {len(best)} trials have {where}: a {'larger' if end == 'top' else 'smaller'} one may be better."
    if name == "rank" and end == "top" and improving:
        line += (
            " They were still improving: this task may hold more than an adapter of that size learns. Raise the range; "
            "if that does not end it, full fine-tuning may do better than LoRA."
        )
    return line


def _improves(curve: Sequence[tuple[int, float]], mode: Literal["min", "max"]) -> bool:
    if len(curve) < 3:
        return False
    last_step, last = curve[-1]
    before = [value for step, value in curve[:-1] if step <= 0.9 * last_step]
    gain = (before[-1] - last) * (1 if mode == "min" else -1) if before else 0.0
    return bool(before) and abs(before[-1]) > 0 and gain / abs(before[-1]) > STILL_FALLS
