"""How large a cluster a sweep is given, and for how long: from its plan, where the user does not say."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from dataclasses import dataclass

from lora_search.errors import InputError
from lora_search.launch.machines import find_gpu
from lora_search.placement import HostPlace, most_trials
from lora_search.plan import DevicePlan, Plan, plan_sweep
from lora_search.plan.schedule import schedule
from lora_search.spec import SweepSpec

USUAL = ("L4", "L40S", "A100 80 GB", "H100 80 GB", "H200")
"""GPUs that clouds rent and that compute bfloat16, by memory: without --gpu, the first that holds the largest trial."""

WORKING_DAY = 8 * 3600
"""Seconds within which a sweep is to end, where more nodes can do it and --nodes does not say."""

SPARE, START = 2.0, 1800
"""The limit is so many times the expected duration, and seconds for starting, loading, testing and merging."""

UNITS = {"m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Wishes:
    """What the user said of the cluster."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    gpu: str | None = None
    time_limit: str | None = None


@dataclass(frozen=True)
class Size:
    """Of a cluster for one sweep."""

    nodes: int
    gpus_per_node: int
    gpu: str | None
    """None: the sweep trains on cores."""
    seconds: float | None
    """Expected duration; None where nothing was planned."""
    limit: int
    """Seconds after which the sweep is ended; a whole number of minutes."""


def size_cluster(spec: SweepSpec, wishes: Wishes) -> Size:
    """Choose what `wishes` leave open, by the sweep's plan. With nodes and a time limit nothing needs to be planned:
    a base may be out of reach from where one submits.

    Raises:
        InputError: a wish cannot be, or the largest trial fits on no such GPU.
    """
    for option, value, least in (("--nodes", wishes.nodes, 1), ("--gpus-per-node", wishes.gpus_per_node, 0)):
        if value is not None and value < least:
            raise InputError(f"{option}: found {value}; allowed: a whole number from {least}")
    gpus = spec.hosts.gpus_per_host if wishes.gpus_per_node is None else wishes.gpus_per_node
    per_host = spec.hosts.gpus_per_host
    if gpus and per_host == 0:
        raise InputError(f"--gpus-per-node: found {gpus}, but hosts.gpus_per_host is 0: the sweep would not use them")
    if gpus % max(1, per_host):
        raise InputError(f"--gpus-per-node: found {gpus}; allowed: multiples of hosts.gpus_per_host, {per_host}")
    if wishes.nodes is not None and wishes.time_limit is not None:
        gpu = find_gpu(wishes.gpu or USUAL[0]) if gpus else None
        return Size(wishes.nodes, gpus, gpu, None, parse_limit(wishes.time_limit))
    plan = _planned(spec)
    if gpus == 0:
        here = next(device for device in plan.devices if device.here)
        nodes = wishes.nodes or 1
        return _limited(wishes, nodes, 0, None, here.seconds / nodes)
    device = _device(spec, plan, wishes.gpu)
    seats = _seats(spec, device)
    nodes = wishes.nodes or _nodes(spec, device, seats, gpus)
    return _limited(wishes, nodes, gpus, device.name, _seconds(spec, device, seats, nodes * gpus))


def parse_limit(text: str) -> int:
    """Seconds of '90m', '8h', '1.5h' or '2d', in whole minutes.

    Raises:
        InputError: it is none of these, or less than a minute.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", text.strip())
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if seconds < 60:
        raise InputError(f"--time-limit: found {text!r}; allowed: minutes, hours or days, such as 90m, 8h or 2d")
    return math.ceil(seconds / 60) * 60


def _planned(spec: SweepSpec) -> Plan:
    """The plan, made here for hosts elsewhere: how many this machine has room for does not matter."""
    hosts = {"count": "auto", "cpus_per_host": "auto", "gpus_per_host": min(1, spec.hosts.gpus_per_host)}
    try:
        here = spec.model_copy(update={"hosts": spec.hosts.model_copy(update=hosts)})
        return plan_sweep(here, gpus=spec.hosts.gpus_per_host)
    except InputError as error:
        raise InputError(f"{error}\nWith --nodes and --time-limit, nothing is planned.") from None


def _limited(wishes: Wishes, nodes: int, gpus: int, gpu: str | None, seconds: float) -> Size:
    if wishes.time_limit is not None:
        limit = parse_limit(wishes.time_limit)
    else:
        limit = math.ceil((SPARE * seconds + START) / 1800) * 1800
    return Size(nodes, gpus, gpu, seconds, limit)


def _device(spec: SweepSpec, plan: Plan, wanted: str | None) -> DevicePlan:
    devices = {device.name: device for device in plan.devices if not device.here}
    name = find_gpu(wanted) if wanted is not None else None
    fitting = [device for device in devices.values() if _holds(spec, device) > 0]
    if name is None:
        usual = [device for device in fitting if device.name in USUAL]
        if usual:
            return usual[0]
    elif devices[name] in fitting:
        return devices[name]
    found = "no GPU" if name is None else repr(name)
    switched = "" if spec.base.gradient_checkpointing else ", or on more with base.gradient_checkpointing: true"
    allowed = ", ".join(device.name for device in fitting) or "none"
    raise InputError(f"--gpu: found {found}; allowed, as the largest trial fits there: {allowed}{switched}")


def _holds(spec: SweepSpec, device: DevicePlan) -> int:
    """Largest trials that fit together on a host."""
    return device.largest_recomputed if spec.base.gradient_checkpointing else device.largest


def _seats(spec: SweepSpec, device: DevicePlan) -> int:
    """Trials that a host holds."""
    most = most_trials(HostPlace("host", "node", 1, spec.hosts.gpus_per_host), spec.hosts)
    return max(1, min(most, _holds(spec, device))) if spec.hosts.trials_per_host == "auto" else most


def _seconds(spec: SweepSpec, device: DevicePlan, seats: int, gpus: int) -> float:
    """Expected duration on so many GPUs. A host over several is as fast as one: its layers wait for each other."""
    hosts = gpus // spec.hosts.gpus_per_host
    return device.seconds / hosts / schedule(spec, hosts * seats).efficiency


def _nodes(spec: SweepSpec, device: DevicePlan, seats: int, gpus: int) -> int:
    """The fewest nodes that make it in a working day, or as many as the trials fill."""
    hosts_per_node = gpus // spec.hosts.gpus_per_host
    if spec.hosts.count != "auto":
        return math.ceil(spec.hosts.count / hosts_per_node)
    most = max(1, math.ceil(schedule(spec, 1).trials / seats / hosts_per_node))

    def in_time(nodes: int) -> bool:
        return _seconds(spec, device, seats, nodes * gpus) <= WORKING_DAY

    return 1 + bisect_left(range(1, most), True, key=in_time)
