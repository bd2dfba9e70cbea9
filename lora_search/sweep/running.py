"""One host, as the driver knows it: its actor, and the calls that it has not answered yet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from lora_search.errors import InputError, SweepError
from lora_search.host import Host, TrainsTrials
from lora_search.placement import HostPlace, Node
from lora_search.storage import Folder
from lora_search.sweep.answers import HostLost, NodeUnready, failure, is_done, unwrap
from lora_search.sweep.build import greet
from lora_search.sweep.cluster import Say, on_node
from lora_search.versions import differences, versions

HOST_CONCURRENCY = 1000
"""Calls that an actor may have open; each seat waits in one."""

HOST_NAMES = "lora-search-"
"""What the names of all hosts begin with, as actors."""


STUCK_S = 1800.0
"""A host that is at one step, or evaluation, or loads the base, for so long may hang."""

ASK_S = 60.0
"""Between two questions to a host how long it has been at what it does."""

LOAD_S = 300.0
"""A host that loads the base for so much longer than another is not waited for: its network or its disk is slow."""


@dataclass(frozen=True)
class Prepared:
    """The data, as one host prepares them for all."""

    by: str
    """The host's name."""
    said: Any
    """A call that is answered by what it says of them."""
    data: Any
    """A call that is answered by the data."""

    def wrong(self) -> SweepError | None:
        """Why there are none, where the host was not able to; None where it was, or is at it."""
        return failure(self.said) if is_done(self.said) else None


@dataclass
class RunningHost:
    """A host, as the driver knows it."""

    place: HostPlace
    capacity: int
    actor: ActorHandle
    alive: Any
    """A call that is never answered: it ends when the host does."""
    started: Any
    """A call that is answered as soon as its process runs."""
    greeting: Any
    """A call that is answered by what its node is like (`greet`); None where the answer has been looked at."""
    since: float
    """When it was asked for, by this process's monotonic clock, in seconds."""
    given: Prepared | None = None
    """What it was given to load the base for."""
    loading: Any = None
    """A call that is answered when the base is loaded; None before it is asked."""
    loaded: bool = False
    late: bool = False
    """It did not start while others did, and nobody waits for it."""
    fewer: Any = None
    """A call that is answered when it holds fewer trials than it has said; None before it is asked."""
    busy: Any = None
    """A call that is answered by how long it has been at what it does; None before it is asked again."""
    busy_s: float = 0.0
    """What it has answered last."""
    asked: float = 0.0
    """When it was asked, by this process's monotonic clock."""
    stuck: bool = False
    """Whether it has been at one thing for too long, and the user has been told."""
    pid: int | None = None
    """Of its process; None before it has loaded the base."""
    trains_since: float | None = None
    """When it had loaded the base, in seconds since the epoch."""
    has_reported: bool = False
    """Whether a trial has come further on it."""
    shunned: set[int] = field(default_factory=set)
    """Trials that it does not take."""
    saving: Any = None
    """A call that is answered when it has kept its trials, since its node is to go."""

    def is_loaded(self, ready: Mapping[str, Any]) -> None:
        """
        Args:
            ready: what it is, as it says; of its capacity memory has had a say by now.
        """
        self.loaded, self.late = True, False
        self.capacity, self.pid = ready["capacity"], ready["pid"]
        self.trains_since = self.trains_since or time.time()

    def heed(self) -> None:
        """Take it to hold no more trials than it has found out by now that it can."""
        if self.fewer is None:
            self.fewer = self.actor.holds_fewer.remote(self.capacity)
        elif is_done(self.fewer):
            self.capacity, self.fewer = unwrap(self.fewer), None

    def gets_stuck(self) -> str | None:
        """What there is to say of one that has come to be at one thing, or without an answer, for too long."""
        now = time.monotonic()
        if self.busy is not None and is_done(self.busy):
            self.busy_s, self.busy = unwrap(self.busy), None
        if self.busy is None and now - self.asked > ASK_S:
            self.busy, self.asked = self.actor.busy_s.remote(), now
        seconds = max(self.busy_s, now - self.asked if self.busy is not None else 0.0)
        was, self.stuck = self.stuck, seconds > STUCK_S
        if was or not self.stuck:
            return None
        return (
            f"WARNING: {self.place.name} on node {self.place.node[:8]} has been at one thing for {seconds / 60:.0f} "
            "min: its device, its disk or its network may hang. If so, end its process"
            f"{f' ({self.pid})' if self.pid else ''}: its trials go on elsewhere from their last checkpoints"
        )

    def shun(self, trial: int) -> None:
        """Have it not take a trial."""
        self.shunned.add(trial)
        self.actor.shun.remote(str(trial))

    def welcome(self, trial: int) -> None:
        """Have it take a trial again, if it does not."""
        if trial in self.shunned:
            self.shunned.remove(trial)
            self.actor.welcome.remote(str(trial))

    def facts(self) -> dict[str, Any]:
        """What the run directory says of it: name, node (its id), pid, capacity, since (when it had loaded the base, in
        seconds since the epoch; None where it has not, as the two before)."""
        return {
            "name": self.place.name,
            "node": self.place.node,
            "pid": self.pid,
            "capacity": self.capacity if self.trains_since else None,
            "since": self.trains_since,
        }

    def hear(self) -> bool:
        """Hold it against this process, where it was started since all others were, as soon as it has said what it is.

        Returns:
            Whether it has been heard just now.

        Raises:
            NodeUnready: it has other versions of what decides a result, or does not see the run directory.
        """
        if self.greeting is None:
            return False
        greeted, self.greeting = unwrap(self.greeting), None
        require_fit(greeted)
        return True

    def leave(self, run: Folder | None) -> list[int] | None:
        """Have it keep its trials as they stand, since its node is to go; which it has kept, as soon as it has.

        Raises:
            HostLost: it was not able to.
        """
        if self.saving is None:
            self.saving = self.actor.save_all.remote(run)
        if not is_done(self.saving):
            return None
        try:
            return [trial for trial, _, _ in unwrap(self.saving)]
        except SweepError as error:
            raise HostLost(f"its node is to go, and it kept no trials: {error}") from error

    def require_alive(self, there: Sequence[Node]) -> None:
        """
        Args:
            there: the nodes that there are now.

        Raises:
            HostLost: it is no more; the message says why.
        """
        if self.place.node not in {node.id for node in there}:
            raise HostLost("its node is gone")
        if is_done(self.alive):
            unwrap(self.alive)


def require_fit(greeted: Any) -> None:
    """
    Args:
        greeted: what a node said (`greet`) that has joined since the sweep began.

    Raises:
        NodeUnready: it has other versions of what decides a result, or does not see the run directory.
    """
    there, unseen = greeted
    if what := differences(versions(), there):
        raise NodeUnready(f"it has {', '.join(what)}")
    if unseen is not None:
        raise NodeUnready(f"it cannot use the run directory: {unseen}")


def unlike(node: str, why: Exception) -> InputError:
    """Of a node that cannot even say which versions it has."""
    return InputError(f"the cluster's nodes differ: node {node[:8]}: {why}; install the same versions on every node")


def require_same(greeted: Iterable[tuple[str, Any]], output: str) -> None:
    """
    Args:
        greeted: the nodes that a sweep begins with, each by its id, and what it said (`greet`).
        output: as in the sweep file.

    Raises:
        InputError: a node has other versions of what decides a result, or does not see the run directory; it says
            which.
    """
    differing, blind = {}, {}
    for node, (there, unseen) in greeted:
        name = f"node {node[:8]}"
        if what := differences(versions(), there):
            differing[name] = f"{name} has {', '.join(what)}"
        if unseen is not None:
            blind[name] = f"{name}: {unseen}"
    if differing:
        found = "; ".join(differing.values())
        raise InputError(f"the cluster's nodes differ: {found}; install the same versions on every node")
    if blind:
        raise InputError(
            f"output: found {output!r}, which not every node can use ({'; '.join(blind.values())}); "
            "allowed: a folder that all nodes see at the same path, or an object store"
        )


def start_host(
    prefix: str, place: HostPlace, capacity: int, build: Callable[[Any], TrainsTrials], run: Folder | None
) -> RunningHost:
    """Start a host; nobody waits until it runs.

    Args:
        prefix: what its name begins with, by which seats find it.
        run: the run directory, which it must see.
    """
    actor = (
        ray.remote(Host)
        .options(
            name=prefix + place.name,
            num_cpus=place.cpus,
            num_gpus=place.gpus,
            max_concurrency=HOST_CONCURRENCY,
            scheduling_strategy=on_node(place.node),
        )
        .remote(place.name, capacity, build)
    )
    alive, started, greeting = actor.live.remote(), actor.room.remote(), actor.run.remote(greet, run)
    return RunningHost(place, capacity, actor, alive, started, greeting, time.monotonic())


def as_they_load(hosts: Sequence[RunningHost], others: bool, say: Say) -> Iterator[RunningHost]:
    """Hosts in the order in which they load the base, then those that cannot, and those that take too long.

    Args:
        others: there are some that have loaded it.
        say: told of those that cannot, while none has and the rest are waited for: the user may not want to.
    """
    waiting, failed = {host.loading: host for host in hosts}, []
    end = time.monotonic() + LOAD_S if others else math.inf
    while waiting:
        left = None if math.isinf(end) else max(0.0, end - time.monotonic())
        done, _ = ray.wait(list(waiting), timeout=left)
        if not done:
            break
        host = waiting.pop(done[0])
        if (why := failure(host.loading)) is not None:
            failed.append(host)
            if waiting and math.isinf(end):
                still = ", ".join(other.place.name for other in waiting.values())
                say(f"WARNING: {host.place.name} has not loaded the base: {why}; waits for {still}")
        else:
            end = min(end, time.monotonic() + LOAD_S)
            yield host
    yield from failed
    yield from waiting.values()


def what_is_held(hosts: Sequence[RunningHost]) -> str:
    """What there is to say of hosts that do not start."""
    alike: dict[tuple[str, int, int], list[str]] = {}
    for host in hosts:
        alike.setdefault((host.place.node[:8], host.place.cpus, host.place.gpus), []).append(host.place.name)
    told = "; ".join(
        f"{', '.join(names)} on node {node} want{'s' * (len(names) == 1)} {cpus} cores and {gpus} GPUs"
        + " each" * (len(names) > 1)
        for (node, cpus, gpus), names in alike.items()
    )
    return f"{told}: something else on the cluster holds them, or the node is slow; as soon as they run, they join"
