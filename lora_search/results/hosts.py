"""The hosts that a sweep has had since its process began, as its run directory says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError


@dataclass(frozen=True)
class RunHost:
    """One of them."""

    name: str
    node: str | None = None
    """Ray's id of it."""
    capacity: Annotated[int, Field(strict=True, gt=0)] | None = None
    """Trials resident at once; None before it has loaded the base."""
    lost: str | None = None
    """Why it is no more; None while it is."""


HOST = TypeAdapter(RunHost)


def run_hosts(facts: Any) -> list[RunHost]:
    """
    Args:
        facts: `hosts` of provenance.json, which may be somebody else's: what is not readable there is left out.
    """
    found = []
    for host in facts if isinstance(facts, list) else ():
        try:
            found.append(HOST.validate_python(host))
        except ValidationError:
            continue
    return found
