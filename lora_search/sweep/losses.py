"""What the nodes of a sweep have lost, and which of them get no hosts any more.

A machine that leaves and joins again is another node to Ray, and the same one here, where its name tells it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from lora_search.errors import SweepError
from lora_search.placement import Node
from lora_search.sweep.answers import HostLost, NodeUnfit
from lora_search.sweep.cluster import Say
from lora_search.sweep.running import RunningHost

LOSSES_PER_NODE = 5
"""Hosts that a node may lose after it has lost as many as it has; then something is wrong with the node."""

REST_S = 20.0
"""From the second host on that a node loses, until it gets another while others run; for each further one twice as
long, up to MOST_REST_S."""

MOST_REST_S = 600.0

QUIET_S = 2 * MOST_REST_S
"""A node that has lost no host for so long gets the next one without a rest again."""

LASTING_S = 3600.0
"""A host that was lost after it had lasted so long says nothing of its node."""


class Losses:
    """The hosts that were lost, by machine."""

    def __init__(self, say: Say) -> None:
        """
        Args:
            say: prints one line to the user.
        """
        self._say = say
        self._counted: Counter[str] = Counter()
        """By machine, those that speak against it."""
        self._again: Counter[str] = Counter()
        """By machine, those that were lost shortly one after the other, whatever came between."""
        self._last: dict[str, float] = {}
        """By machine, when one was counted."""
        self.has_trained = False
        """Whether any host has ever loaded the base."""
        self._unfit: set[str] = set()
        """Nodes and machines that get no hosts any more."""
        self._none_since: float | None = None
        """When the last host was lost, while there is none."""

    def add(self, host: RunningHost, lost: HostLost, then: str = "", *, counts: bool = True) -> None:
        """Say that a host was lost, and hold it against its node.

        Args:
            then: what comes of it.
            counts: whether it is held against it.
        """
        if isinstance(lost, NodeUnfit):
            self._refuse(host.place.node, str(lost))
        else:
            self._say(f"{host.place.name} was lost: {lost}{'; ' if then else ''}{then}")
            if counts:
                self._count(host)

    def _refuse(self, node: str, why: str) -> None:
        """A node gets no hosts any more, since none would be of use there."""
        if node not in self._unfit:
            self._unfit.add(node)
            self._say(f"WARNING: node {node[:8]} is of no use: {why}")

    def _count(self, host: RunningHost) -> None:
        """Count a host that was lost against its node, and give that up where it has lost too many.

        One that had lasted speaks for its node; and of several that are lost at once, as all of a machine's, the others
        say no more than the first: only one that has come since does. Where none has ever loaded the base, each counts:
        the user is to hear of it soon.
        """
        now, machine = time.monotonic(), host.place.machine
        if host.loaded and now - host.since > LASTING_S:
            self._counted[machine] = self._again[machine] = 0
            return
        if (host.loaded or self.has_trained) and host.since < self._last.get(machine, host.since):
            return
        self._counted[machine] += 1
        self._again[machine] = 1 + self._again[machine] * (now - self._last.get(machine, now) < QUIET_S)
        self._last[machine] = now
        if self._counted[machine] > LOSSES_PER_NODE + host.place.neighbours and machine not in self._unfit:
            self._unfit.add(machine)
            self._say(f"WARNING: node {host.place.node[:8]} gets no more hosts: it has lost {self._counted[machine]}")

    def trained(self, host: RunningHost) -> None:
        """A trial has come further on a host for the first time: where that has come since its node lost one, one less.

        Trials that end their hosts, one after the other, are not to cost a node that others are trained on. It rests
        as long: a GPU that fails every few minutes would have the same trials lost until they are given up.
        """
        machine = host.place.machine
        if self._counted[machine] and host.since >= self._last[machine]:
            self._counted[machine] -= 1

    def unfit(self, there: Sequence[Node]) -> set[str]:
        """Nodes that get no hosts any more."""
        return {node.id for node in there if not self._unfit.isdisjoint((node.id, node.machine))}

    def resting(self, there: Sequence[Node]) -> set[str]:
        """Nodes that get no host just now, since what there was on their machines was lost again and again."""
        now = time.monotonic()
        rests = {it: min(MOST_REST_S, REST_S * 2 ** (count - 2)) for it, count in self._again.items() if count > 1}
        return {node.id for node in there if now - self._last.get(node.machine, now) < rests.get(node.machine, 0.0)}

    def bear_none(self, none: bool, wait_s: float) -> None:
        """Bear for some time that there is no host, if there is none.

        Args:
            wait_s: seconds, until nodes join.

        Raises:
            SweepError: there has been none for so long.
        """
        if not none:
            self._none_since = None
            return
        if self._none_since is None:
            self._none_since = time.monotonic()
            if wait_s:
                self._say(f"all hosts were lost; nodes that join within {wait_s:.0f} s (hosts.wait_s) get new ones")
        if time.monotonic() - self._none_since >= wait_s:
            raise SweepError("all hosts were lost, and none can be started; the sweep can be resumed with --resume")
