"""Domains: the values that one searched parameter may take, as the sweep file writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

Scalar = Any
"""A YAML value: number, string, boolean, null, or a list of strings (target modules)."""

KINDS = {
    "choice": "{choice: [a, b, ...]}",
    "uniform": "{uniform: [low, high]}",
    "log_uniform": "{log_uniform: [low, high]}",
    "int_uniform": "{int_uniform: [low, high]}",
}


@dataclass(frozen=True)
class Choice:
    """One of the listed values."""

    values: tuple[Scalar, ...]

    def probes(self) -> tuple[Scalar, ...]:
        return self.values

    def contains(self, value: Scalar) -> bool:
        return value in self.values

    def plain(self) -> Any:
        return {"choice": list(self.values)}


@dataclass(frozen=True)
class Fixed:
    """Always this value: not searched."""

    value: Scalar

    def probes(self) -> tuple[Scalar, ...]:
        return (self.value,)

    def contains(self, value: Scalar) -> bool:
        return bool(value == self.value)

    def plain(self) -> Any:
        return self.value


@dataclass(frozen=True)
class _Range:
    low: float
    high: float

    def probes(self) -> tuple[Scalar, ...]:
        return (self.low, self.high)

    def contains(self, value: Scalar) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high


@dataclass(frozen=True)
class Uniform(_Range):
    """A real number between low and high, both included."""

    def plain(self) -> Any:
        return {"uniform": [self.low, self.high]}


@dataclass(frozen=True)
class LogUniform(_Range):
    """A real number between low and high, drawn on a log scale; low is above zero."""

    def plain(self) -> Any:
        return {"log_uniform": [self.low, self.high]}


@dataclass(frozen=True)
class IntUniform(_Range):
    """A whole number between low and high, both included."""

    low: int
    high: int

    def contains(self, value: Scalar) -> bool:
        return isinstance(value, int) and super().contains(value)

    def plain(self) -> Any:
        return {"int_uniform": [self.low, self.high]}


AnyDomain = Choice | Fixed | Uniform | LogUniform | IntUniform


def parse_domain(raw: Any) -> AnyDomain:
    """The domain that `raw` writes.

    Raises:
        ValueError: an unknown kind, an empty or repeated choice, a range that is empty or not numbers.
    """
    if isinstance(raw, AnyDomain):
        return raw
    if not isinstance(raw, dict):
        if raw is None:
            raise ValueError(f"nothing was given; allowed: a value, or {', '.join(KINDS.values())}")
        return Fixed(raw)
    if len(raw) != 1 or next(iter(raw)) not in KINDS:
        raise ValueError(f"found {_short(raw)}; allowed: a value, or one of {', '.join(KINDS.values())}")
    kind, argument = next(iter(raw.items()))
    if not isinstance(argument, list):
        raise ValueError(f"{kind} takes a list, as in {KINDS[kind]}; found {_short(argument)}")
    if kind == "choice":
        return _choice(argument)
    return _range(kind, argument)


def _choice(values: list[Any]) -> Choice:
    if not values:
        raise ValueError("choice is empty; at least one value is needed")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"choice lists {_short(value)} twice")
    return Choice(tuple(values))


def _range(kind: str, bounds: list[Any]) -> Uniform | LogUniform | IntUniform:
    numbers = [b for b in bounds if isinstance(b, int | float) and not isinstance(b, bool)]
    if len(bounds) != 2 or len(numbers) != 2:
        raise ValueError(f"{kind} takes two numbers, as in {KINDS[kind]}; found {_short(bounds)}")
    low, high = numbers
    try:
        float(low), float(high)
    except OverflowError:  # whole numbers of YAML have any length
        raise ValueError(f"{kind} takes numbers of up to 308 digits; found {_short(bounds)}") from None
    if not low < high:
        raise ValueError(f"{kind} needs low below high; found {_short(bounds)}")
    if kind == "int_uniform":
        if not (isinstance(low, int) and isinstance(high, int)):
            raise ValueError(f"int_uniform takes two whole numbers; found {_short(bounds)}")
        return IntUniform(low, high)
    if kind == "log_uniform":
        if low <= 0:
            raise ValueError(f"log_uniform needs low above 0; found {_short(bounds)}")
        return LogUniform(float(low), float(high))
    return Uniform(float(low), float(high))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


Domain = Annotated[AnyDomain, PlainValidator(parse_domain), PlainSerializer(lambda domain: domain.plain())]
"""The pydantic type of a domain: a mapping of one known kind, or a plain value that is then fixed."""
