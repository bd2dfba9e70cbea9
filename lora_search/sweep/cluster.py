"""The cluster: connect to Ray, see its nodes, start and end the hosts."""

from __future__ import annotations

import logging
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray
from ray._private import ray_constants
from ray.actor import ActorHandle
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lora_search.errors import InputError, SweepError
from lora_search.host import Host, TrainsTrials
from lora_search.placement import HostPlace, Node, most_trials, place_hosts
from lora_search.spec import Hosts as HostSpec
from lora_search.spec import SweepSpec
from lora_search.storage import Folder
from lora_search.sweep.capacity import device_of, gauge
from lora_search.versions import differences, versions

if TYPE_CHECKING:
    from lora_search.data import TokenizedData

logger = logging.getLogger(__name__)

Say = Callable[[str], None]

T = TypeVar("T")
R = TypeVar("R")

HOST_CONCURRENCY = 1000
"""Calls that an actor may have open; each seat waits in one."""

SEATS = "lora_search_seats"
"""A resource of the clusters that we start, of which each seat takes an equal part."""

SEATS_TOTAL = 10_000

HOST_NAMES = "lora-search-"
"""What the names of all hosts begin with, as actors."""

LOOK_EVERY_S = 1.0

LOSSES_PER_NODE = 5
"""Hosts that a node may lose; then something is wrong with the node."""

SAVE_S = 60.0
"""A host that takes longer to save its trials when the sweep is interrupted is not waited for."""

SEAT_BYTES = 200 << 20
"""Memory of a seat: a Python process with Ray Tune in it."""

Build = Callable[[SweepSpec, HostPlace, int, Any], TrainsTrials]
"""Makes a host's engine, on the host, from the sweep, its place, its capacity and the data."""


@contextmanager
def cluster(address: str | None, say: Say = lambda line: None) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start one on this machine; ends what it started.

    One that is started here listens on 127.0.0.1 alone, and asks for Ray's token.

    Args:
        say: prints one line to the user.

    Raises:
        SweepError: there is no cluster at the address.
    """
    ours = not ray.is_initialized()
    if ours:
        if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
            say(
                f"WARNING: RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}: whoever reaches Ray's ports can run code as "
                "you; unset it, and Ray asks for its token"
            )
        # No runtime_env: workers that Ray has started ahead would not have it, and be thrown away.
        options: dict[str, Any] = {} if address else {"include_dashboard": False, "resources": {SEATS: SEATS_TOTAL}}
        try:
            with nullcontext() if address else _on_loopback(), _private_token():
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


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have a Ray that is started meanwhile take 127.0.0.1 for its address, and listen on no other.

    It is what Ray does of itself on macOS and Windows; `_node_ip_address="127.0.0.1"` it replaces by the machine's
    address (Ray 2.60, _private/services.py), and then listens on all interfaces.
    """
    many_nodes = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = many_nodes


@contextmanager
def _private_token() -> Iterator[None]:
    """Let nobody else read the token that Ray may make meanwhile; its file is made by the umask (Ray 2.60)."""
    token = Path.home() / ".ray" / "auth_token"
    there = token.exists()
    yield
    if not there and token.exists():
        token.chmod(0o600)


def nodes() -> tuple[Node, ...]:
    """The living nodes of the cluster."""
    return tuple(
        Node(node["NodeID"], int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    )


@contextmanager
def asked_of_autoscaler(hosts: HostSpec, trials: int) -> Iterator[None]:
    """Have a cluster that grows make room for as many hosts as the sweep's trials fill, and let it shrink at the end.

    A cluster without an autoscaler takes no notice.
    """
    bundle = {"GPU": hosts.gpus_per_host} if hosts.gpus_per_host else {"CPU": 1}
    place = HostPlace("", "", 1, hosts.gpus_per_host)
    wanted = math.ceil(trials / most_trials(place, hosts)) if hosts.count == "auto" else hosts.count
    request_resources(bundles=[bundle] * wanted)
    try:
        yield
    finally:
        request_resources(bundles=[])


def _first_places(hosts: HostSpec) -> tuple[HostPlace, ...]:
    """Where the first hosts go, as soon as there are GPUs, or when `hosts.wait_s` have passed; later ones follow.

    Raises:
        InputError: the cluster has no room for the hosts that the sweep file asks for.
    """
    end = time.monotonic() + hosts.wait_s
    while True:
        there = nodes()
        if time.monotonic() >= end or not hosts.gpus_per_host or any(node.gpus for node in there):
            try:
                return place_hosts(there, hosts)
            except InputError:
                if time.monotonic() >= end:
                    raise
        time.sleep(LOOK_EVERY_S)


@dataclass
class _Running:
    """A host, as the driver knows it."""

    place: HostPlace
    capacity: int
    actor: ActorHandle
    alive: Any
    """A call that is never answered: it ends when the host does."""
    loading: Any = None
    """A call that is answered when the base is loaded."""
    versions: Any = None
    """A call that is answered with the versions on its node."""


class Hosts:
    """The hosts of a sweep. Nodes that join get hosts, nodes that leave lose theirs, a host that dies is replaced.

    Seats find them by name.
    """

    def __init__(self, spec: SweepSpec, build: Build, say: Say = lambda line: None) -> None:
        """Start them over all nodes.

        Args:
            build: makes the engine on the host.
            say: prints one line to the user.

        Raises:
            InputError: the cluster has no room for the hosts that the sweep file asks for.
        """
        self._spec, self._build, self._say = spec, build, say
        self.prefix = f"{HOST_NAMES}{uuid.uuid4().hex[:12]}-"
        """What the names of their actors begin with."""
        self._running: dict[str, _Running] = {}
        self._started = 0
        self._losses: Counter[str] = Counter()
        """Hosts lost by node."""
        self._looked = time.monotonic()
        self._work: Callable[[], tuple[Any, Any]]
        self._data: Any = None
        for place in _first_places(spec.hosts):
            self._start(place)

    @property
    def places(self) -> tuple[HostPlace, ...]:
        return tuple(host.place for host in self._running.values())

    @property
    def actors(self) -> tuple[ActorHandle, ...]:
        return tuple(host.actor for host in self._running.values())

    @property
    def capacity(self) -> int:
        """Trials that all hosts together hold."""
        return sum(host.capacity for host in self._running.values())

    def require_same_versions(self) -> None:
        """
        Raises:
            InputError: a node has other versions of what decides a result; it says which.
        """
        here = versions()
        answers = {host.place.node: host.actor.run.remote(versions) for host in self._running.values()}
        wrong = {node: differences(here, unwrap(answer)) for node, answer in answers.items()}
        if any(wrong.values()):
            found = "; ".join(f"node {node[:8]} has {', '.join(what)}" for node, what in wrong.items() if what)
            raise InputError(f"the cluster's nodes differ: {found}; install the same versions on every node")

    def prepare(self, work: Callable[[HostPlace], tuple[T, Any]], warm: Callable[[], None]) -> T:
        """Have one host prepare the data for all; what it says of it.

        Args:
            work: given the host's place; what is said of the data, and the data.
            warm: what the other hosts do meanwhile.
        """
        first, *others = self._running.values()
        self._work = partial(work, first.place)
        said, self._data = first.actor.run.options(num_returns=2).remote(self._work)
        for host in others:
            host.actor.run.remote(warm)
        return cast("T", unwrap(said))

    def load(self) -> list[dict[str, Any]]:
        """Have every host load the base, for trials on the data; what each one is.

        Raises:
            InputError, SweepError: a host cannot be started; the message says why.
        """
        return [unwrap(answer) for answer in [actor.load.remote(self._data) for actor in self.actors]]

    def look(self) -> None:
        """See which hosts and nodes have come and gone, and put a host where there should be one. Never waits.

        Raises:
            SweepError: no host is left, and none can be started.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        there = nodes()
        for name, host in list(self._running.items()):
            why = self._why_lost(host, there)
            if why is not None:
                del self._running[name]
                self._losses[host.place.node] += 1
                self._say(f"{host.place.name} was lost: {why}; its trials go on elsewhere from their last checkpoints")
        for place in self._missing(there):
            host = self._start(place)
            host.versions = host.actor.run.remote(versions)
            host.loading = host.actor.load.remote(self._data)
            self._say(f"{host.place.name} starts on node {place.node[:8]}")
        if not self._running:
            raise SweepError("all hosts were lost, and none can be started; the sweep can be resumed with --resume")

    def _why_lost(self, host: _Running, there: Sequence[Node]) -> str | None:
        """Why a host is no more; None where it lives."""
        if host.place.node not in {node.id for node in there}:
            return "its node is gone"
        if host.versions is not None and (other := _answered(host.versions)) is not None:
            host.versions = None
            if what := differences(versions(), other):
                ray.kill(host.actor)
                return f"its node has {', '.join(what)}"
        if host.loading is not None and (why := _failed(host.loading)) is not None:
            if "ObjectLost" in why or "OwnerDied" in why:  # the data went with the node that had prepared it
                _, self._data = host.actor.run.options(num_returns=2).remote(self._work)
                host.loading = host.actor.load.remote(self._data)
                return None
            ray.kill(host.actor)
            return why
        return _failed(host.alive)

    def _missing(self, there: Sequence[Node]) -> list[HostPlace]:
        """Places without a host; a node that loses one host after the other gets no more."""
        try:
            wanted = place_hosts(there, self._spec.hosts)
        except InputError:  # not as many as the sweep file asks for: all that there can be
            wanted = place_hosts(there, self._spec.hosts.model_copy(update={"count": "auto"})) if there else ()
        taken = Counter(place.node for place in self.places)
        missing = []
        for place in wanted:
            if taken[place.node]:
                taken[place.node] -= 1
            elif self._losses[place.node] <= LOSSES_PER_NODE:
                missing.append(place)
        return missing

    def _start(self, place: HostPlace) -> _Running:
        place = replace(place, name=f"host-{self._started}")
        self._started += 1
        capacity = most_trials(place, self._spec.hosts)
        actor = (
            ray.remote(Host)
            .options(
                name=self.prefix + place.name,
                num_cpus=place.cpus,
                num_gpus=place.gpus,
                max_concurrency=HOST_CONCURRENCY,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=place.node, soft=False),
            )
            .remote(place.name, capacity, partial(self._build, self._spec, place, capacity))
        )
        host = _Running(place, capacity, actor, actor.live.remote())
        self._running[place.name] = host
        return host

    def finish(self, test: Callable[[Any], T], merge: Callable[[Any], R]) -> tuple[T, R]:
        """Have one host test with its engine, and the last one merge on its device, which it makes free for that."""
        actors = self.actors
        tested = actors[0].run_with_engine.remote(test)
        if len(actors) == 1:
            ray.wait([tested])
        ray.wait([actors[-1].unload.remote()])
        merged = actors[-1].run.remote(merge, self._data)
        return unwrap(tested), unwrap(merged)

    def save_all(self, run: Folder) -> list[tuple[int, int, str]]:
        """End all training, and keep a checkpoint of every resident trial: trial, step, path in the run directory.

        A host that is lost, or cannot write, keeps none; its trials have those of their last reports.
        """
        saved = []
        for answer in [actor.save_all.remote(run) for actor in self.actors]:
            try:
                saved += ray.get(answer, timeout=SAVE_S)
            except ray.exceptions.RayError as error:
                logger.warning("a host kept no checkpoints: %s", error)
        return saved

    def release(self, trial: int) -> None:
        """Let a trial go, wherever it is resident."""
        for actor in self.actors:
            actor.release.remote(str(trial))

    def end(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


def _answered(answer: Any) -> Any:
    """What a call was answered; None where it has not been, or has failed."""
    ready, _ = ray.wait([answer], timeout=0)
    return ray.get(answer) if ready and _failed(answer) is None else None


def _failed(answer: Any) -> str | None:
    """Why a call failed; None where it has not been answered, or is done."""
    ready, _ = ray.wait([answer], timeout=0)
    if not ready:
        return None
    try:
        ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        return f"{type(error.cause).__name__}: {error.cause}"
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[0]
    return None


def seat_resources(capacity: int) -> dict[str, float]:
    """What Ray Tune asks for a seat, which needs no core and no GPU of its own.

    Where no more than `capacity` seats fit, Tune waits for one to become free. Where more fit, a trial that finds no
    seat free at the moment is given a new process, takes over the next free seat all the same, and throws the new
    process away; from then on every trial costs one (seen in Ray 2.60: 0.8 s a trial instead of 0.2).
    """
    total = ray.cluster_resources().get(SEATS)
    return {SEATS: max(1, int(total) // capacity)} if total else {"memory": SEAT_BYTES}


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
