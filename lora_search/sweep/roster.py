"""Which hosts a sweep has: started, struck off, replaced, ended."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle

from lora_search.placement import HostPlace, Node, missing_hosts, most_trials
from lora_search.spec import SweepSpec
from lora_search.storage import Folder
from lora_search.sweep.answers import HostLost
from lora_search.sweep.build import Build
from lora_search.sweep.cluster import Say, first_places, nodes, staying
from lora_search.sweep.losses import Losses
from lora_search.sweep.running import HOST_NAMES, RunningHost, start_host
from lora_search.sweep.shunned import Shunned

LOOK_EVERY_S = 1.0


class Roster:
    """The hosts that there are, by name; there is one wherever there should be one, as soon as it is asked to fill."""

    def __init__(self, spec: SweepSpec, build: Build, say: Say, run: Folder | None) -> None:
        """Start them over all nodes.

        Args:
            build: makes the engine on the host.
            say: prints one line to the user.
            run: the run directory, which each host must see.

        Raises:
            InputError: the cluster has no room for the hosts that the sweep file asks for.
        """
        self._spec, self._build, self._say, self._run = spec, build, say, run
        self.prefix = f"{HOST_NAMES}{uuid.uuid4().hex[:12]}-"
        """What the names of their actors begin with."""
        self._running: dict[str, RunningHost] = {}
        self._started = 0
        self._losses = Losses(say)
        self._shunned = Shunned()
        self._lost: list[dict[str, Any]] = []
        """What there is to say of those that were lost."""
        places = first_places(spec.hosts)
        self._on_gpus = any(place.gpus for place in places)
        for place in places:
            self._start(place)

    @property
    def places(self) -> tuple[HostPlace, ...]:
        return tuple(host.place for host in self._running.values())

    @property
    def actors(self) -> tuple[ActorHandle, ...]:
        return tuple(host.actor for host in self._running.values())

    @property
    def facts(self) -> list[dict[str, Any]]:
        """Of all hosts that there have been, `RunningHost.facts`; of one that was lost, also why."""
        return [*self._lost, *(host.facts() for host in self._running.values())]

    @property
    def capacity(self) -> int:
        """Trials that all hosts together hold; one where there is no host for the moment, so that one waits for it.

        With none that runs or waits Tune would look at nothing else for ten minutes (tune_controller.py of 2.60,
        _maybe_update_trial_queue).
        """
        return max(1, sum(host.capacity for host in self._begun))

    @property
    def _begun(self) -> list[RunningHost]:
        return [host for host in self._running.values() if not host.late]

    @property
    def _ready(self) -> list[RunningHost]:
        return [host for host in self._running.values() if host.loaded]

    def renew(self) -> None:
        """Strike off those that are no more, after one was lost: `finish` waits for one that has loaded the base."""
        there = nodes()
        for host in list(self._running.values()):
            try:
                host.require_alive(there)
            except HostLost as lost:
                self._lose(host, lost)

    def _lose(self, host: RunningHost, lost: HostLost, then: str = "", *, counts: bool = True) -> None:
        """Strike it off, and say so.

        Args:
            then: what comes of it.
            counts: hold it against its node.
        """
        self._drop(host)
        self._shunned.gone(host.place.name)
        self._losses.has_trained |= any(known["since"] for known in (*self.facts, host.facts()))
        self._lost.append(host.facts() | {"lost": str(lost)})
        self._losses.add(host, lost, then, counts=counts)

    def _drop(self, host: RunningHost) -> None:
        ray.kill(host.actor)  # where it is not its process that has ended
        del self._running[host.place.name]

    def _replace_all(self) -> None:
        """Put hosts in place of those that were lost, where none is left; wait as long as the sweep file allows.

        While there is one, `look` does it, and nobody waits.

        Raises:
            SweepError: no host is left, and none can be started.
        """
        if not self._begun:
            self._fill(staying())
        while not self._running:
            time.sleep(LOOK_EVERY_S)
            self._fill(staying())

    def _fill(self, there: Sequence[Node]) -> None:
        """Start a host wherever there should be one and is none.

        A sweep that began on GPUs gets none on cores. There may be none at all for `hosts.wait_s`, until nodes join.

        Raises:
            SweepError: no host is left, and none can be started.
        """
        out = self._losses.unfit(there).union(self._losses.resting(there) if self._running else ())
        sound = [node for node in there if node.id not in out]
        missing = missing_hosts(sound, self._spec.hosts, self.places)
        started = [self._start(place) for place in missing if place.gpus or not self._on_gpus]
        for host in started:
            self._say(f"{host.place.name} starts on node {host.place.node[:8]}")
        self._losses.bear_none(not self._running, self._spec.hosts.wait_s)

    def _start(self, place: HostPlace) -> RunningHost:
        place = replace(place, name=f"host-{self._started}")
        self._started += 1
        capacity = most_trials(place, self._spec.hosts)
        build = partial(self._build, self._spec, place, capacity)
        host = self._running[place.name] = start_host(self.prefix, place, capacity, build, self._run)
        self._shunned.begun(host)
        return host

    def end(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
