"""What the nodes of a sweep have lost, and which of them get no hosts any more."""

from __future__ import annotations

import time
from collections import Counter

from lora_search.errors import SweepError
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
    """The hosts that were lost, by node."""

    def __init__(self, say: Say) -> None:
        """
        Args:
            say: prints one line to the user.
        """
        self._say = say
        self._counted: Counter[str] = Counter()
        """By node, those that speak against it."""
        self._again: Counter[str] = Counter()
        """By node, those that were lost shortly one after the other, whatever came between."""
        self._last: dict[str, float] = {}
        """By node, when one was counted."""
        self.has_trained = False
        """Whether any host has ever loaded the base."""
        self.unfit: set[str] = set()
        """Nodes that get no hosts any more."""
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
        if node not in self.unfit:
            self.unfit.add(node)
            self._say(f"WARNING: node {node[:8]} is of no use: {why}")

    def _count(self, host: RunningHost) -> None:
        """Count a host that was lost against its node, and give that up where it has lost too many.

        One that had lasted speaks for its node; and of several that are lost at once, as all of a machine's, the others
        say no more than the first: only one that has come since does. Where none has ever loaded the base, each counts:
        the user is to hear of it soon.
        """
        now, node = time.monotonic(), host.place.node
        if host.loaded and now - host.since > LASTING_S:
            self._counted[node] = self._again[node] = 0
            return
        if (host.loaded or self.has_trained) and host.since < self._last.get(node, host.since):
            return
        self._counted[node] += 1
        self._again[node] = 1 + self._again[node] * (now - self._last.get(node, now) < QUIET_S)
        self._last[node] = now
        if self._counted[node] > LOSSES_PER_NODE + host.place.neighbours and node not in self.unfit:
            self.unfit.add(node)
            self._say(f"WARNING: node {node[:8]} gets no more hosts: it has lost {self._counted[node]}")

    def trained(self, host: RunningHost) -> None:
        """A trial has come further on a host for the first time: where that has come since its node lost one, one less.

        Trials that end their hosts, one after the other, are not to cost a node that others are trained on. It rests
        as long: a GPU that fails every few minutes would have the same trials lost until they are given up.
        """
        node = host.place.node
        if self._counted[node] and host.since >= self._last[node]:
            self._counted[node] -= 1

    def resting(self) -> set[str]:
        """Nodes that get no host just now, since what there was on them was lost again and again."""
        now = time.monotonic()
        again = {node: min(MOST_REST_S, REST_S * 2 ** (count - 2)) for node, count in self._again.items() if count > 1}
        return {node for node, rest in again.items() if now - self._last[node] < rest}

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
