"""Which hosts a cluster gets: a pure function of its nodes and the sweep file's `hosts`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_search.errors import InputError
from lora_search.spec import Hosts

HOSTS_PER_NODE = 4
"""Hosts on a node without GPUs, at most, where the sweep file leaves it open. Rather many hosts of few threads than one
of many: OpenMP's threads wait for each other at every product, and where another program takes one of their cores for
a moment all of them stand still (analysis/benchmarks/NOTES.md)."""

TRIALS_PER_GPU = 16
"""Trials resident on a host for each of its GPUs, where the sweep file leaves it open and memory does not say less."""

TRIALS_PER_CORE, FEW_TRIALS_PER_CORE = 4, 2
"""The same for each thread of a host without a GPU: as many as the first while that is no more than TRIALS_PER_GPU, but
never fewer than the second. A pack of four has a tenth more tokens a second than one of two, and the more trials are at
a rung at once, the better those are told apart that are to go on; the less, though, the search has learnt as it
proposes them (analysis/benchmarks/NOTES.md)."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, and what Ray says it has."""

    id: str
    """Ray's: another one each time that the machine joins."""
    cpus: int
    gpus: int
    hostname: str = ""
    """What no other living node has; empty where one does."""

    @property
    def machine(self) -> str:
        """What it is known by, however often it leaves and joins again."""
        return self.hostname or self.id


@dataclass(frozen=True)
class HostPlace:
    """A host to be: on which node, with what."""

    name: str
    node: str
    cpus: int
    """Cores that Ray sets aside for it; none where a node has fewer cores than GPUs."""
    gpus: int
    neighbours: int = 1
    """Hosts on the same node, this one among them."""
    hostname: str = ""
    """`Node.hostname` of that node."""

    @property
    def machine(self) -> str:
        """`Node.machine` of its node."""
        return self.hostname or self.node

    @property
    def threads(self) -> int:
        return max(1, self.cpus)


def place_hosts(nodes: Sequence[Node], hosts: Hosts) -> tuple[HostPlace, ...]:
    """One host for each GPU (or `gpus_per_host` of them) of every node; one a group of cores where there are none.

    Raises:
        InputError: the cluster has no room for the hosts that the sweep file asks for.
    """
    with_gpus = hosts.gpus_per_host > 0 and any(node.gpus for node in nodes)
    places: list[HostPlace] = []
    for node in nodes:
        if with_gpus:
            count = node.gpus // hosts.gpus_per_host
            cpus = node.cpus // max(1, count)
        else:
            cpus = _group(node.cpus, hosts, len(nodes))
            count = node.cpus // cpus
        if hosts.cpus_per_host != "auto":
            cpus = hosts.cpus_per_host
            count = min(count, node.cpus // cpus) if with_gpus else node.cpus // cpus
        gpus = hosts.gpus_per_host if with_gpus else 0
        names = [f"host-{len(places) + i}" for i in range(count)]
        places += [HostPlace(name, node.id, cpus, gpus, hostname=node.hostname) for name in names]
    wanted = len(places) if hosts.count == "auto" else hosts.count
    if not places or wanted > len(places):
        has = f"{sum(node.cpus for node in nodes)} cores and {sum(node.gpus for node in nodes)} GPUs"
        raise InputError(
            f"hosts.count: found {hosts.count}, but the cluster ({has}) has room for {len(places)} hosts "
            f"with gpus_per_host {hosts.gpus_per_host} and cpus_per_host {hosts.cpus_per_host}"
        )
    chosen = places[:wanted]
    on_node = Counter(place.node for place in chosen)
    return tuple(replace(place, neighbours=on_node[place.node]) for place in chosen)


def missing_hosts(nodes: Sequence[Node], hosts: Hosts, running: Sequence[HostPlace]) -> tuple[HostPlace, ...]:
    """Places without a host: what a node has left, and never more hosts in all than the sweep file asks for.

    Args:
        nodes: those that there are now.
        running: the hosts' places, of before nodes came or went.
    """
    try:
        wanted = place_hosts(nodes, hosts)
    except InputError:  # not as many as the sweep file asks for: all that there can be
        if hosts.count == "auto":
            return ()
        return missing_hosts(nodes, hosts.model_copy(update={"count": "auto"}), running)[: hosts.count - len(running)]
    taken = Counter(place.node for place in running)
    cores = {n.id: n.cpus - sum(place.cpus for place in running if place.node == n.id) for n in nodes}
    gpus = {n.id: n.gpus - sum(place.gpus for place in running if place.node == n.id) for n in nodes}
    left = len(wanted) if hosts.count == "auto" else hosts.count - len(running)
    missing: list[HostPlace] = []
    for place in wanted:
        if taken[place.node]:
            taken[place.node] -= 1
        elif place.cpus <= cores[place.node] and place.gpus <= gpus[place.node] and len(missing) < left:
            cores[place.node] -= place.cpus
            gpus[place.node] -= place.gpus
            missing.append(place)
    return tuple(missing)


def most_trials(place: HostPlace, hosts: Hosts) -> int:
    """Trials resident on a host at once, at most; where the sweep file leaves it open, its memory has a say too."""
    if hosts.trials_per_host != "auto":
        return hosts.trials_per_host
    if place.gpus:
        return TRIALS_PER_GPU * place.gpus
    return max(FEW_TRIALS_PER_CORE * place.threads, min(TRIALS_PER_CORE * place.threads, TRIALS_PER_GPU))


def _group(cores: int, hosts: Hosts, nodes: int) -> int:
    """Cores of one host on a node without GPUs."""
    share = cores // HOSTS_PER_NODE if hosts.count == "auto" else cores * nodes // hosts.count
    return max(1, min(cores, share))
