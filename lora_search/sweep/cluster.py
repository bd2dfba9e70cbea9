"""The cluster: connect to Ray, see its nodes, start and end the hosts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lora_search.errors import SweepError
from lora_search.host import Host, TrainsTrials
from lora_search.spec import SweepSpec
from lora_search.sweep.placement import HostPlace, Node, place_hosts, trials_per_host

if TYPE_CHECKING:
    from lora_search.data import TokenizedData

HOST_CONCURRENCY = 1000
"""Calls that an actor may have open; each seat waits in one."""

SEATS = "lora_search_seats"
"""A resource of the clusters that we start, of which each seat takes an equal part."""

SEATS_TOTAL = 10_000

SEAT_BYTES = 200 << 20
"""Memory of a seat: a Python process with Ray Tune in it."""

Build = Callable[[SweepSpec, HostPlace, Sequence[Any]], TrainsTrials]
"""Makes a host's engine, on the host, from the sweep, its place and the reference to the data."""


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

    def wait_ready(self) -> list[dict[str, Any]]:
        """Wait until every host has loaded the base; what each one is.

        Raises:
            InputError, SweepError: a host cannot be started; the message says why.
        """
        return [unwrap(actor.ready.remote()) for actor in self.actors]

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


def start_hosts(spec: SweepSpec, data: Any, build: Build) -> Hosts:
    """Start the hosts of a sweep over all nodes; they load the base while we go on.

    Args:
        data: the object reference to the tokenised data.
        build: makes the engine on the host.
    """
    places = place_hosts(nodes(), spec.hosts)
    capacity = trials_per_host(spec.hosts)
    actor_class = ray.remote(Host)
    actors = tuple(
        actor_class.options(
            num_cpus=place.cpus,
            num_gpus=place.gpus,
            max_concurrency=HOST_CONCURRENCY,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=place.node, soft=False),
        ).remote(place.name, capacity, _Builder(build, spec, place, [data]))
        for place in places
    )
    return Hosts(places, actors, capacity * len(actors))


@dataclass(frozen=True)
class _Builder:
    """`build` with its arguments, in a form that travels."""

    build: Build
    spec: SweepSpec
    place: HostPlace
    data: Sequence[Any]

    def __call__(self) -> TrainsTrials:
        return self.build(self.spec, self.place, self.data)


def build_engine(spec: SweepSpec, place: HostPlace, data: Sequence[Any]) -> TrainsTrials:
    """The real engine: the base on this host's device, the data out of the object store."""
    import torch

    from lora_search.engine import Engine
    from lora_search.model import load_base

    torch.set_num_threads(place.threads)
    device = "cuda" if place.gpus and torch.cuda.is_available() else "cpu"
    base = load_base(spec.base, device)
    tokens: TokenizedData = ray.get(data[0])
    return Engine(base, tokens)


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
