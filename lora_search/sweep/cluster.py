"""The cluster: connect to Ray or start it, see its nodes, ask its autoscaler for more."""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray._private.node import Node as RayNode
from ray._private.state import state
from ray._private.utils import detect_fate_sharing_support
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lora_search.errors import InputError, SweepError
from lora_search.placement import HostPlace, Node, most_trials, place_hosts
from lora_search.spec import Hosts as HostSpec
from lora_search.sweep.signals import sigterm_for_this_process_alone, sigterm_kept_from_ray

Say = Callable[[str], None]

PAUSE_S = 1.0
"""Between two looks for a first GPU."""


@contextmanager
def cluster(address: str | None, say: Say = lambda line: None) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start one on this machine; ends what it started.

    One that is started here listens on 127.0.0.1 alone, and asks for Ray's token.

    Args:
        say: prints one line to the user.

    Raises:
        SweepError: there is no cluster at the address, or it cannot be used.
    """
    ours = not ray.is_initialized()
    try:
        if ours:
            _begin(address, say)
        yield
    finally:
        if ours:
            _end()


def _begin(address: str | None, say: Say) -> None:
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        say(
            f"WARNING: RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}: whoever reaches Ray's ports can run code as "
            "you; unset it, and Ray asks for its token"
        )
    # No runtime_env: workers that Ray has started ahead would not have it, and be thrown away.
    options: dict[str, Any] = {} if address else {"include_dashboard": False}
    try:
        with (
            nullcontext() if address else _on_loopback(),
            nullcontext() if address or not detect_fate_sharing_support() else sigterm_for_this_process_alone(),
            _private_token(),
            sigterm_kept_from_ray(),
            _no_handler_of_crashes(),
        ):
            ray.init(
                address=address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                **options,
            )
            ray_worker._worker_logs_enabled = False  # else what raylets say is printed in spite of log_to_driver
    except ConnectionError as error:
        raise SweepError(_no_answer(address, error)) from None
    except Exception as error:  # of many kinds: ports, memory, a machine too busy to start it in time
        if address:  # as one of another version of Ray or Python
            raise SweepError(f"the cluster at {address} cannot be used: {' '.join(str(error).split())}") from error
        raise SweepError(f"Ray did not start: {str(error).strip().splitlines()[0]}") from error


def _end() -> None:
    """Leave the cluster, and end what was started here of it."""
    if (node := ray_worker._global_node) is not None:
        node.kill_all_processes = partial(_kill_all, node)  # ray.shutdown calls it, when it has let go of them itself
    with _nothing_collected():
        ray.shutdown()
    ray_worker._worker_logs_enabled = True


def _kill_all(node: RayNode, **told: Any) -> None:
    """End Ray's processes at once. `ray.shutdown` sends SIGTERM and waits a second for each: none listens to that."""
    started = [process.process for processes in node.all_processes.values() for process in processes]
    below = []
    for process in started:
        with suppress(psutil.Error):
            if process.poll() is None:
                below += psutil.Process(process.pid).children(recursive=True)  # they would notice within seconds
    RayNode.kill_all_processes(node, check_alive=False)
    for child in below:
        with suppress(psutil.Error):
            child.kill()


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Have Python collect its garbage before, and not meanwhile.

    Any thread may do so at any time, as W&B's; and where a reference of Ray's is freed while Ray ends, that ends the
    process, whatever it had left to do (ray-project/ray#19115).
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _no_answer(address: str | None, error: ConnectionError) -> str:
    message = f"no Ray cluster answers at {address} (of --address or RAY_ADDRESS): {error}"
    if "RAY_AUTH_MODE" not in os.environ:  # Ray shows its token to an address that it was told of only if asked to
        message += "; if it asks for Ray's token, set RAY_AUTH_MODE=token in this environment"
    return message


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
def _no_handler_of_crashes() -> Iterator[None]:
    """Have this process alone not take absl's handler, which is C++: a SIGTERM while Ray starts would end it at once.

    Of a crash Ray has Python's faulthandler tell as well (Ray 2.60, _private/worker.py).
    """
    disabled = ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER
    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    try:
        yield
    finally:
        ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = disabled


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
    there = [node for node in ray.nodes() if node["Alive"]]
    called = Counter(node["NodeManagerHostname"] for node in there)
    return tuple(
        Node(
            node["NodeID"],
            int(node["Resources"].get("CPU", 0)),
            int(node["Resources"].get("GPU", 0)),
            hostname=name if called[name := node["NodeManagerHostname"]] == 1 else "",
        )
        for node in there
    )


def on_node(node: str) -> NodeAffinitySchedulingStrategy:
    """Of what is to run on that node, and on no other."""
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def warned() -> frozenset[str]:
    """The nodes that are to go: by `ray drain-node`, or as `ray start --block` got SIGTERM, after which it has 30 s."""
    return frozenset(state.get_draining_nodes())


def staying() -> tuple[Node, ...]:
    """The living nodes that are not to go."""
    going = warned()
    return tuple(node for node in nodes() if node.id not in going)


@contextmanager
def asked_of_autoscaler(hosts: HostSpec, trials: int) -> Iterator[Callable[[int], None]]:
    """Have a cluster that grows make room for as many hosts as the sweep's trials fill, and let it shrink at the end.

    A cluster without an autoscaler takes no notice.

    Yields:
        What asks again, once it is known how many trials fit on a host.
    """
    bundle = {"GPU": hosts.gpus_per_host} if hosts.gpus_per_host else {"CPU": 1}

    def ask(trials_per_host: int) -> None:
        wanted = math.ceil(trials / trials_per_host) if hosts.count == "auto" else hosts.count
        request_resources(bundles=[bundle] * wanted)

    ask(most_trials(HostPlace("", "", 1, hosts.gpus_per_host), hosts))
    try:
        yield ask
    finally:
        request_resources(bundles=[])


def first_places(hosts: HostSpec) -> tuple[HostPlace, ...]:
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
        time.sleep(PAUSE_S)
