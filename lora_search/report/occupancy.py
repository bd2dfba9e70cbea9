"""How full the hosts were over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_search.report.values import percent
from lora_search.results.events import Event
from lora_search.results.hosts import RunHost

UNKNOWN = "not known yet"
"""The host of a trial that has not reported."""

STRETCHES = 400
"""Equal stretches of time over which the picture is averaged."""


@dataclass(frozen=True)
class Stay:
    """A stretch of time for which a trial was resident on a host, in seconds since 1970."""

    trial: int
    host: str
    begin: float
    end: float


def stays(events: Sequence[Event], now: float | None) -> list[Stay]:
    """From each trial's start, or resumption, to its end; a lost one's ends with what was last heard of it.

    Args:
        now: until when trials that have not ended stay; None where nothing runs any more.
    """
    found: list[Stay] = []
    begun: dict[int, float] = {}
    heard: dict[int, float] = {}
    host: dict[int, str] = {}

    def leave(trial: int, time: float) -> None:
        begin, place = begun.pop(trial, None), host.pop(trial, UNKNOWN)
        if begin is not None and time > begin:
            found.append(Stay(trial, place, begin, time))

    for event in events:
        trial: int = event["trial"]
        time: float = event["time"]
        match event["event"]:
            case "start":
                begun.setdefault(trial, time)
            case "resume":
                leave(trial, heard.get(trial, time))
                begun[trial] = time
            case "report" if trial in begun:
                place = event.get("host") or UNKNOWN
                if trial in host and host[trial] != place:
                    leave(trial, heard[trial])
                    begun[trial] = heard[trial]
                host[trial] = place
            case "end":
                leave(trial, time)
        heard[trial] = time
    for trial in list(begun):
        leave(trial, now if now is not None else heard[trial])
    return found


def occupancy(stays: Sequence[Stay], capacities: Mapping[str, float]) -> dict[str, Any]:
    """Trials resident on each host over time.

    Returns:
        times (seconds since the first began), hosts (name, capacity or None, resident: one for each time, mean), mean
        and capacity of all hosts together; capacity is None where that of a host is not known.
    """
    if not stays:
        return {"times": [], "hosts": [], "mean": None, "capacity": None}
    began, ended = min(stay.begin for stay in stays), max(stay.end for stay in stays)
    edges = [began + i * (ended - began) / STRETCHES for i in range(STRETCHES + 1)]
    names = sorted({*capacities, *(stay.host for stay in stays)})
    hosts = []
    for name in names:
        resident = _resident([stay for stay in stays if stay.host == name], edges)
        spent = sum(stay.end - stay.begin for stay in stays if stay.host == name)
        hosts.append(
            {
                "name": name,
                "capacity": capacities.get(name),
                "resident": resident,
                "mean": round(spent / (ended - began), 3),
            }
        )
    known = all(host["capacity"] is not None for host in hosts if host["name"] != UNKNOWN)
    return {
        "times": [round(time - began, 2) for time in edges],
        "hosts": hosts,
        "mean": sum(stay.end - stay.begin for stay in stays) / (ended - began),
        "capacity": sum(capacities.values()) if known and capacities else None,
    }


def _resident(stays: Sequence[Stay], edges: Sequence[float]) -> list[float]:
    """Mean number of trials between each edge and the next; nothing after the last."""
    import numpy as np

    grid = np.asarray(edges)
    area = np.zeros(len(grid))  # trial-seconds up to each edge
    for stay in stays:
        area += np.clip(grid, stay.begin, stay.end) - stay.begin
    mean = np.diff(area) / np.diff(grid)
    return [*(round(float(value), 2) for value in mean), 0.0]


def capacities(hosts: Sequence[RunHost]) -> dict[str, int]:
    """Trials that fit on each host; left out are those that were lost, which had room for a part of the time only."""
    return {host.name: host.capacity for host in hosts if host.capacity is not None and host.lost is None}


def occupancy_finding(found: Mapping[str, Any]) -> str:
    """The caption: how full on the whole."""
    if found["mean"] is None:
        return "No trial has begun yet."
    hosts = [host for host in found["hosts"] if host["name"] != UNKNOWN]
    mean, places = found["mean"], found["capacity"]
    where = f"on {len(hosts)} hosts" if len(hosts) != 1 else "on one host"
    if places is None:
        return f"On average {mean:.1f} trials were resident {where}."
    return f"On average {mean:.1f} of {places:.0f} places {where} were taken ({percent(min(1.0, mean / places))})."
