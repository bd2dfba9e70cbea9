"""Which trials are kept off which hosts: off those in place of one with which they were lost, while there is another.

A GPU that fails would else be given the same trials again and again, since it has room, until they are given up.
"""

from __future__ import annotations

from collections.abc import Collection

from lora_search.sweep.running import RunningHost


class Shunned:
    """Trials that were lost with their hosts, and have not reported since."""

    def __init__(self) -> None:
        self._order: dict[str, str] = {}
        """By name, the nodes of all hosts that there have been, in the order in which they began."""
        self._nodes: dict[int, set[str]] = {}
        """By trial, the nodes on which it was lost."""

    def begun(self, host: RunningHost) -> None:
        """A host begins, maybe in place of another."""
        self._order[host.place.name] = host.place.node
        for trial, nodes in self._nodes.items():
            if host.place.node in nodes:
                host.shun(trial)

    def lost(self, trial: int, name: str, hosts: Collection[RunningHost]) -> None:
        """A trial was lost with the host of that name: one of its node's GPUs may be at fault, or the trial.

        Those that were there beside it have other GPUs; those that have come since may have the same.

        Args:
            hosts: all that there are.
        """
        order = list(self._order)
        node, later = self._order[name], {*order[order.index(name) + 1 :]}
        self._nodes.setdefault(trial, set()).add(node)
        for host in hosts:
            if host.place.node == node and host.place.name in later:
                host.shun(trial)

    def welcome(self, trial: int, hosts: Collection[RunningHost]) -> None:
        """A trial has come further, or has ended: every host may have it."""
        if self._nodes.pop(trial, None) is not None:
            for host in hosts:
                host.welcome(trial)

    def look(self, hosts: Collection[RunningHost]) -> None:
        """Let trials in anywhere of which no host would have one.

        Args:
            hosts: all that there are.
        """
        ready = [host for host in hosts if host.loaded]
        for trial in [trial for trial in self._nodes if ready and all(trial in host.shunned for host in ready)]:
            self.welcome(trial, hosts)
