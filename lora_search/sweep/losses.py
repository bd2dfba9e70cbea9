"""What the nodes of a sweep have lost, and which of them get no hosts any more."""

from __future__ import annotations

import time
from collections import Counter

from lora_search.sweep.cluster import Say
from lora_search.sweep.running import RunningHost

LOSSES_PER_NODE = 5
"""Hosts that a node may lose after it has lost as many as it has; then something is wrong with the node."""

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
        self._last: dict[str, float] = {}
        """By node, when one was counted."""
        self.unfit: set[str] = set()
        """Nodes that get no hosts any more."""

    def refuse(self, node: str, why: str) -> None:
        """A node gets no hosts any more, since none would be of use there."""
        if node not in self.unfit:
            self.unfit.add(node)
            self._say(f"WARNING: node {node[:8]} is of no use: {why}")

    def count(self, host: RunningHost) -> None:
        """Count a host that was lost against its node, and give that up where it has lost too many.

        Of hosts that train, one that had lasted speaks for its node; and of several that are lost at once, as all of a
        machine's, the others say no more than the first: only one that has come since does.
        """
        now, node = time.monotonic(), host.place.node
        if host.loaded and now - host.since > LASTING_S:
            self._counted[node] = 0
            return
        if host.loaded and host.since < self._last.get(node, host.since):
            return
        self._counted[node] += 1
        self._last[node] = now
        if self._counted[node] > LOSSES_PER_NODE + host.place.neighbours and node not in self.unfit:
            self.unfit.add(node)
            self._say(f"WARNING: node {node[:8]} gets no more hosts: it has lost {self._counted[node]}")
