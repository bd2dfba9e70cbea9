"""Which trials are kept off which hosts: off those in place of one with which they were lost, while there is another.

A GPU that fails would else be given the same trials again and again, since it has room, until they are given up.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from lora_search.sweep.running import RunningHost

SHUNNED_S = 600.0
"""A trial that was lost longer ago may go anywhere: it may wait for the only host that is large enough."""


class Shunned:
    """Trials that were lost with their hosts, and have not reported since."""

    def __init__(self) -> None:
        self._order: dict[str, str] = {}
        """By name, the machines of all hosts that there have been, in the order in which they began."""
        self._gone: dict[str, int] = {}
        """By name of one that is no more, how many there had been until then."""
        self._machines: dict[int, set[str]] = {}
        """By trial, the machines on which it was lost."""
        self._since: dict[int, float] = {}
        """By trial, when it was lost last, by the monotonic clock."""

    def begun(self, host: RunningHost) -> None:
        """A host begins, maybe in place of another."""
        self._order[host.place.name] = host.place.machine
        for trial, machines in self._machines.items():
            if host.place.machine in machines:
                host.shun(trial)

    def gone(self, name: str) -> None:
        """The host of that name is no more."""
        self._gone.setdefault(name, len(self._order))

    def lost(self, trial: int, name: str, hosts: Collection[RunningHost]) -> None:
        """A trial was lost with the host of that name: one of its node's GPUs may be at fault, or the trial.

        Those that were there beside it have other GPUs; those that have come since may have the same.

        Args:
            hosts: all that there are.
        """
        self.gone(name)
        machine, since = self._order[name], {*list(self._order)[self._gone[name] :]}
        self._machines.setdefault(trial, set()).add(machine)
        self._since[trial] = time.monotonic()
        for host in hosts:
            if host.place.machine == machine and host.place.name in since:
                host.shun(trial)

    def reported(self, trial: int, name: str, hosts: Collection[RunningHost]) -> None:
        """A trial has come further on the host of that name: that one is sound, and so is the trial."""
        self.ended(trial, hosts)
        for host in hosts if self._machines else ():
            if host.place.name == name:
                for other in list(host.shunned):
                    host.welcome(other)

    def ended(self, trial: int, hosts: Collection[RunningHost]) -> None:
        """A trial may be anywhere, from now on."""
        self._since.pop(trial, None)
        if self._machines.pop(trial, None) is not None:
            for host in hosts:
                host.welcome(trial)

    def look(self, hosts: Collection[RunningHost]) -> None:
        """Let trials in anywhere of which no host would have one, or that have been kept off for long.

        Args:
            hosts: all that there are.
        """
        ready, now = [host for host in hosts if host.loaded], time.monotonic()
        for trial, since in list(self._since.items()):
            if now - since > SHUNNED_S or (ready and all(trial in host.shunned for host in ready)):
                self.ended(trial, hosts)
