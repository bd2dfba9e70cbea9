"""Ray Tune's control loop: what becomes of seats whose machine is short of memory, or taken, or not as the others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_spec, wait_until
from ray.air.execution import ResourceRequest
from ray.air.execution._internal import RayActorManager
from ray.air.execution._internal.tracked_actor_task import TrackedActorTask
from ray.air.execution.resources.placement_group import PlacementGroupResourceManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.experiment import Trial
from ray.tune.utils.object_cache import _ObjectCache
from test_cluster import with_other_peft
from test_seat import build_idle

from lora_search.rundir import create_run
from lora_search.seat import SEAT_BYTES
from lora_search.sweep.controller import _Controller, _Seats
from lora_search.sweep.hosts import Hosts
from lora_search.sweep.trials import TUNE_ENV, search
from lora_search.tracking import Observer


@pytest.fixture
def ray() -> Iterator[Any]:
    import ray

    from lora_search.sweep.cluster import cluster

    with cluster(None):
        yield ray


def test_seat_that_ray_ends_where_memory_is_short_is_lost_as_any_other(ray: Any) -> None:
    class Waits:
        def wait(self) -> None:
            """Is there."""

    seats = _Seats(PlacementGroupResourceManager())
    seats.barred = tuple
    errors: list[Exception] = []
    actor = RayActorManager.add_actor(
        seats,
        ray.remote(Waits),
        {},
        ResourceRequest([{"memory": SEAT_BYTES}]),
        on_error=lambda actor, error: errors.append(error),
    )
    wait_until(lambda: bool(seats.next(timeout=1) or True) and seats.is_actor_started(actor))
    for barred in ({"another"}, {node["NodeID"] for node in ray.nodes()}):
        seats.barred = lambda barred=barred: barred
        assert seats.is_barred(actor) == ("another" not in barred)
    seats._actor_task_failed(
        TrackedActorTask(actor), OutOfMemoryError("the node was low on memory.\nTo solve this, ...")
    )
    (error,) = errors
    assert isinstance(error, RayActorError)
    assert str(error) == "OutOfMemoryError: the node was low on memory."
    assert not seats.is_barred(actor)
    assert not seats.is_actor_started(actor)


OTHER_RAY = """
import sys
import ray
from lora_search.errors import SweepError
from lora_search.sweep.cluster import cluster

ray.__version__ = "9.9"
try:
    with cluster(sys.argv[1]):
        print("connected")
except SweepError as error:
    print(error)
"""


def test_cluster_of_another_ray_is_one_message() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        address = cluster.address
        answer = subprocess.run([sys.executable, "-c", OTHER_RAY, address], capture_output=True, text=True, timeout=60)
    finally:
        cluster.shutdown()
    expected = f"the cluster at {address} cannot be used: Version mismatch: "
    assert answer.stdout.startswith(expected), answer.stderr
    assert answer.stdout.count("\n") == 1


def test_trial_whose_node_is_taken_is_not_put_on_a_seat_again_by_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    """The searcher proposes it again, so that it is looked for where it may be resident, and its losses are counted."""
    for name, value in TUNE_ENV.items():
        monkeypatch.setenv(name, value)
    trial = Trial("seat", stub=True)
    trial._handle_ray_actor_error(RayActorError(preempted=True))
    assert not trial.should_recover()


def test_seat_that_waits_for_a_trial_on_a_node_that_was_barred_since_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    trial, gone = Trial("seat", stub=True), list[str]()
    controller = object.__new__(_Controller)
    controller._actor_cache = _ObjectCache()
    controller._actor_manager = SimpleNamespace(is_barred=lambda seat: seat == "barred")  # type: ignore[assignment]
    controller._trial_to_actor, controller._resetting_trials = {}, set()
    monkeypatch.setattr(controller, "_remove_actor", lambda tracked_actor: gone.append(tracked_actor))
    controller._actor_cache.increase_max(trial.placement_group_factory, 2)
    for seat in ("barred", "barred"):
        assert controller._actor_cache.cache_object(trial.placement_group_factory, seat)
    assert not controller._maybe_reuse_cached_actor(trial)
    assert gone == ["barred", "barred"]
    assert controller._actor_cache.num_cached_objects == 0


@pytest.mark.slow
def test_no_seat_is_on_a_node_that_has_joined_with_other_versions(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets no host, having no GPU; and has memory, of which the first has none left for a second seat."""
    import ray
    from ray._private.state import actors
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # hosts import test_seat
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "memory": SEAT_BYTES * 3 // 2}
    )

    class Joins(Observer):
        """Adds the node, and lets more trials run as soon as it is known what it is like."""

        def trial_started(self, trial: int, parameters: Mapping[str, Any]) -> None:
            if trial == 2:
                cluster.add_node(num_cpus=1, num_gpus=0, env_vars={"PYTHONPATH": with_other_peft(tmp_path)})

        def tick(self) -> None:
            if said and not more:
                more.append(time.monotonic())

    said: list[str] = []
    more: list[float] = []
    spec = make_spec(
        tiny,
        name="joined",
        hosts={"trials_per_host": 3},
        search={"trials": 250, "sampler": {"name": "random"}, "scheduler": {"name": "none"}},
        output=str(tmp_path),
    )
    run = create_run(tmp_path, spec.name, exact=True)
    run.spec.touch()
    ray.init(cluster.address, log_to_driver=False)
    hosts = Hosts(spec, build_idle, said.append, run.folder)
    try:
        hosts.require_same_nodes()
        hosts.load()
        monkeypatch.setattr(Hosts, "capacity", property(lambda self: 3 if more else 1))
        rows = search(spec, run, hosts, [Joins()])
        (first,) = {place.node for place in hosts.places}
        seats = [actor for actor in actors().values() if actor["ActorClassName"] == "Seat"]
    finally:
        hosts.end()
        ray.shutdown()
        cluster.shutdown()
    assert len(rows) == 250
    assert more
    assert " is of no use: it has peft 9.9 (here " in said[0]
    assert {seat["Address"]["NodeID"] for seat in seats if seat["Address"]["NodeID"]} == {first}
