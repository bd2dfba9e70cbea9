"""Values as the page takes them: JSON without what JSON does not know, and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """A value of JSON: NaN and infinity, which are none, are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def number(value: Any) -> float | None:
    """A finite number, as one that may be somebody else's; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # JSON's whole numbers have no end
        return None
    return found if math.isfinite(found) else None


def text(value: Any) -> str:
    """A parameter's value as it is shown."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def duration(seconds: float) -> str:
    """`94 s`, `12 min`, `3 h 20 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60} min"


def percent(share: float) -> str:
    """`53 %`."""
    return f"{100 * share:.0f} %"


def count(value: int, name: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{value:,} {name}{'' if value == 1 else 's'}"


def listed(names: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
