"""The hosts that a sweep has had since its process began, and what they train, as its run directory says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from lora_search.results.events import Event

WINDOW_S = 600.0
"""Before a host's last report, over which its speed is reckoned."""

SHORT_S = 1.0
"""Over less, a report's own figure says more."""


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


@dataclass(frozen=True)
class _Stretch:
    """What a trial has done on a host from one line of the record to its next report."""

    begins: float
    ends: float
    tokens: int
    own: float
    """Tokens a second of the passes that it was in, as it says; evaluation is not in it."""


def host_packs(hosts: Sequence[RunHost], events: Iterable[Event], since: float) -> dict[str, dict[str, Any]]:
    """By host that has loaded the base, or reported a trial: its node, its places, the trials that it has, its speed.

    A trial is where it has reported last, unless it has been lost since. The speed is that of all its trials, in tokens
    trained on a second of wall time, from WINDOW_S before its last report.

    Args:
        since: when the sweep's process began, in seconds since 1970: hosts of the one before had the same names.
    """
    at: dict[int, str] = {}
    before: dict[int, Event] = {}
    tokens: dict[int, int] = {}
    stretches: dict[str, list[_Stretch]] = {}
    for event in events:
        trial = event["trial"]
        if event["event"] == "report":
            done, host = event.get("tokens") or 0, event.get("host")
            if host is not None and event["time"] > since:
                at[trial] = host
                begins = max(since, before.get(trial, event)["time"])
                stretch = _Stretch(
                    begins, event["time"], done - tokens.get(trial, 0), event.get("tokens_per_second") or 0.0
                )
                stretches.setdefault(host, []).append(stretch)
            tokens[trial] = done
        elif event["event"] in ("resume", "end"):
            at.pop(trial, None)
        before[trial] = event
    here = {host.name: host for host in hosts if host.lost is None and host.capacity is not None}
    gone = {host.name for host in hosts if host.lost is not None}
    return {
        name: {
            "node": here.get(name, RunHost(name)).node,
            "capacity": here.get(name, RunHost(name)).capacity,
            "trials": sorted(trial for trial, host in at.items() if host == name),
            "tokens_per_second": _speed(stretches.get(name, [])),
        }
        for name in sorted({*here, *at.values()} - gone, key=lambda name: (len(name), name))
    }


def _speed(stretches: Sequence[_Stretch]) -> float:
    if not stretches:
        return 0.0
    end = stretches[-1].ends
    begin = max(end - WINDOW_S, min(stretch.begins for stretch in stretches))
    if end - begin < SHORT_S:
        return stretches[-1].own
    done = 0.0
    for stretch in stretches:
        if stretch.ends > begin:
            within = (stretch.ends - max(begin, stretch.begins)) / max(stretch.ends - stretch.begins, 1e-9)
            done += max(0, stretch.tokens) * within
    return done / (end - begin)
