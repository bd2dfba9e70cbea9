"""What was searched, and on which kind of axis each parameter is drawn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lora_search.report.values import number, text
from lora_search.results import PLANNED, Row, column
from lora_search.spec import Choice, Domain, Fixed, LogUniform, SweepSpec

ALWAYS = ("rank", "alpha", "dropout", "target_modules", "learning_rate")
"""Every trial has these, whether searched or not."""

FEW = 12
"""So many different numbers stand beside each other; more need a scale."""

LABELS = {
    "rank": "rank",
    "alpha": "alpha",
    "alpha_ratio": "alpha / rank",
    "dropout": "dropout",
    "target_modules": "target set",
    "learning_rate": "learning rate",
    PLANNED: "planned steps",
}


@dataclass(frozen=True)
class Parameter:
    """A parameter whose trials differ in it."""

    name: str
    """Of its column in a row."""
    label: str
    scale: Literal["linear", "log", "category"]
    categories: list[str]
    """In their order, numbers ascending; empty on a scale of numbers."""
    searched: bool
    """False: it follows from others, as alpha does from its ratio."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parameters(spec: SweepSpec, rows: list[Row]) -> list[Parameter]:
    """The parameters in which trials differ, the usual five first."""
    domains = {column(name): domain for name, domain in spec.search.space.items()}
    found = (
        _parameter(name, domains.get(name), [row[name] for row in rows if row.get(name) is not None])
        for name in shown_names(spec)
    )
    return [parameter for parameter in found if parameter is not None]


def shown_names(spec: SweepSpec) -> list[str]:
    """What rows call the parameters that are shown: the usual five, and those that are searched."""
    return list(dict.fromkeys((*ALWAYS, *map(column, spec.search.space))))


def _parameter(name: str, domain: Domain | None, values: list[Any]) -> Parameter | None:
    searched = domain is not None and not isinstance(domain, Fixed)
    different = {text(value) for value in values}
    if len(different) < 2:
        return None
    label = LABELS.get(name, name.replace("_", " "))
    numbers = [number(value) for value in values]
    is_number = all(value is not None for value in numbers)
    if not is_number or isinstance(domain, Choice) or (len(different) <= FEW and not searched):
        listed = list(domain.values) if isinstance(domain, Choice) else []
        order = {text(value): number(value) or 0.0 for value in (*listed, *values)}
        categories = sorted(order, key=lambda value: order[value]) if is_number else list(order)
        return Parameter(name, label, "category", categories, searched)
    positive = all(value > 0 for value in numbers if value is not None)
    scale: Literal["linear", "log"] = "log" if isinstance(domain, LogUniform) and positive else "linear"
    return Parameter(name, label, scale, [], searched)
