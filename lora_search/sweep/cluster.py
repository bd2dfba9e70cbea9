"""The cluster: connect to Ray, see its nodes, start and end the hosts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lora_search.errors import SweepError
from lora_search.host import Host, TrainsTrials
from lora_search.placement import HostPlace, Node, most_trials, place_hosts
from lora_search.spec import SweepSpec
from lora_search.sweep.capacity import device_of, gauge

if TYPE_CHECKING:
    from lora_search.data import TokenizedData

T = TypeVar("T")
R = TypeVar("R")

HOST_CONCURRENCY = 1000
"""Calls that an actor may have open; each seat waits in one."""

SEATS = "lora_search_seats"
"""A resource of the clusters that we start, of which each seat takes an equal part."""

SEATS_TOTAL = 10_000

SEAT_BYTES = 200 << 20
"""Memory of a seat: a Python process with Ray Tune in it."""

Build = Callable[[SweepSpec, HostPlace, int, Any], TrainsTrials]
"""Makes a host's engine, on the host, from the sweep, its place, its capacity and the data."""


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start one on this machine; ends what it started.

    Raises:
        SweepError: there is no cluster at the address.
    """
    ours = not ray.is_initialized()
    if ours:
        # No runtime_env: workers that Ray has started ahead would not have it, and be thrown away.
        options: dict[str, Any] = {} if address else {"include_dashboard": False, "resources": {SEATS: SEATS_TOTAL}}
        try:
            ray.init(
                address=address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                **options,
            )
        except ConnectionError as error:
            raise SweepError(f"--address {address}: no Ray cluster answers: {error}") from None
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def nodes() -> tuple[Node, ...]:
    """The living nodes of the cluster."""
    return tuple(
        Node(node["NodeID"], int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    )


@dataclass(frozen=True)
class Hosts:
    """The running hosts of a sweep."""

    places: tuple[HostPlace, ...]
    actors: tuple[ActorHandle, ...]
    capacity: int
    """Trials that all hosts together hold."""

    def prepare(self, work: Callable[[], tuple[T, Any]], warm: Callable[[], None]) -> tuple[T, Any]:
        """Have one host prepare what all need; what it says of it, and the reference to the rest.

        Args:
            warm: what the other hosts do meanwhile.
        """
        first, *others = self.actors
        said, data = first.run.options(num_returns=2).remote(work)
        for actor in others:
            actor.run.remote(warm)
        return unwrap(said), data

    def load(self, data: Any) -> list[dict[str, Any]]:
        """Have every host load the base; what each one is.

        Args:
            data: what the trials are trained on, or the reference to it.

        Raises:
            InputError, SweepError: a host cannot be started; the message says why.
        """
        return [unwrap(answer) for answer in [actor.load.remote(data) for actor in self.actors]]

    def finish(self, test: Callable[[Any], T], merge: Callable[[Any], R], data: Any) -> tuple[T, R]:
        """Have one host test with its engine, and the last one merge on its device, which it makes free for that."""
        tested = self.actors[0].run_with_engine.remote(test)
        if len(self.actors) == 1:
            ray.wait([tested])
        ray.wait([self.actors[-1].unload.remote()])
        merged = self.actors[-1].run.remote(merge, data)
        return unwrap(tested), unwrap(merged)

    def release(self, trial: int) -> None:
        """Let a trial go, wherever it is resident."""
        for actor in self.actors:
            actor.release.remote(str(trial))

    def end(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


def seat_resources(capacity: int) -> dict[str, float]:
    """What Ray Tune asks for a seat, which needs no core and no GPU of its own.

    Where no more than `capacity` seats fit, Tune waits for one to become free. Where more fit, a trial that finds no
    seat free at the moment is given a new process, takes over the next free seat all the same, and throws the new
    process away; from then on every trial costs one (seen in Ray 2.60: 0.8 s a trial instead of 0.2).
    """
    total = ray.cluster_resources().get(SEATS)
    return {SEATS: max(1, int(total) // capacity)} if total else {"memory": SEAT_BYTES}


def start_hosts(spec: SweepSpec, build: Build) -> Hosts:
    """Start the hosts of a sweep over all nodes.

    Args:
        build: makes the engine on the host.
    """
    places = place_hosts(nodes(), spec.hosts)
    capacities = [most_trials(place, spec.hosts) for place in places]
    actor_class = ray.remote(Host)
    actors = tuple(
        actor_class.options(
            num_cpus=place.cpus,
            num_gpus=place.gpus,
            max_concurrency=HOST_CONCURRENCY,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=place.node, soft=False),
        ).remote(place.name, capacity, partial(build, spec, place, capacity))
        for place, capacity in zip(places, capacities, strict=True)
    )
    return Hosts(places, actors, sum(capacities))


def build_engine(spec: SweepSpec, place: HostPlace, capacity: int, data: TokenizedData) -> TrainsTrials:
    """The real engine, with the base on this host's device; on a CPU, a lane a core."""
    import torch

    from lora_search.engine import Engine
    from lora_search.model import load_base

    torch.set_num_threads(place.threads)
    lanes = min(place.threads, capacity)
    fits = gauge(spec, place, lanes, capacity, data) if spec.hosts.trials_per_host == "auto" else None
    return Engine(load_base(spec.base, device_of(place)), data, lanes, fits)


def import_engine() -> None:
    """Import what an engine takes seconds to import."""
    import lora_search.engine
    import lora_search.model  # noqa: F401


def unwrap(reference: Any) -> Any:
    """`ray.get` that raises our own errors as they were raised, and others as a SweepError."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SweepError):
            raise type(cause)(str(cause)) from None
        raise SweepError(f"{type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayError as error:
        raise SweepError(f"a host was lost: {error}") from error
