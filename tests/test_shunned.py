"""A GPU that fails, and a trial that ends its hosts: neither has sound trials given up."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_spec
from test_seat import IdleEngine, ResumingEngine, fresh_run

from lora_search.checkpoint import Checkpoint
from lora_search.placement import HostPlace, Node, place_hosts
from lora_search.space import TrialConfig
from lora_search.spec import Hosts, SweepSpec
from lora_search.tracking import Observer

STEPS = 8


class Steady(ResumingEngine):
    """Takes a while for a step, so that trials are there together."""

    def step(self, trials: Sequence[str]) -> dict[str, Any]:
        time.sleep(0.1)
        return super().step(trials)


class Sick(ResumingEngine):
    """Fails in its second step."""

    def step(self, trials: Sequence[str]) -> dict[str, Any]:
        if self.log:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().step(trials)


class Harmed(Steady):
    """Stands still from when trial 1 comes; when two others have come, or none for long, its process ends."""

    def __init__(self) -> None:
        super().__init__()
        self._ends: float | None = None

    def admit(self, trial: str, config: TrialConfig, checkpoint: Checkpoint | None = None) -> None:
        super().admit(trial, config, checkpoint)
        if trial == "1":
            self._ends = time.monotonic() + 5

    def step(self, trials: Sequence[str]) -> dict[str, Any]:
        if self._ends is None:
            return super().step(trials)
        if time.monotonic() > self._ends or len(self.steps) > 2:
            os._exit(1)
        time.sleep(0.1)
        return {}


class Fatal(Steady):
    """Its process ends as it is given trial 1, or 3."""

    def admit(self, trial: str, config: TrialConfig, checkpoint: Checkpoint | None = None) -> None:
        if trial in ("1", "3"):
            os._exit(1)
        super().admit(trial, config, checkpoint)


def build_second_is_sick(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> IdleEngine:
    return Steady() if place.name == "host-0" else Sick()


def build_harmed(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> IdleEngine:
    return Harmed()


def build_fatal(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> IdleEngine:
    return Fatal()


class Losses(Observer):
    """Counts how often trials went on after a loss."""

    def __init__(self) -> None:
        self.of: Counter[int] = Counter()

    def trial_resumed(self, trial: int, parameters: Mapping[str, Any], step: int, damaged: Any) -> None:
        self.of[trial] += 1


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import ray

    from lora_search.sweep.cluster import cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # hosts import this file
    monkeypatch.setattr("lora_search.sweep.losses.REST_S", 0.0)
    with cluster(None):
        yield ray


def searched(ray: Any, tiny: Path, output: Path, build: Any, hosts: Mapping[str, Any], trials: int) -> tuple[Any, ...]:
    """Rows, how often each trial went on, what was said."""
    from lora_search.sweep.hosts import Hosts
    from lora_search.sweep.trials import search

    spec = make_spec(
        tiny,
        name="shunned",
        hosts=hosts,
        search={"trials": trials, "sampler": {"name": "random"}, "scheduler": {"name": "none"}},
        training={"steps": STEPS, "eval_every": STEPS // 2},
        output=str(output),
    )
    said: list[str] = []
    losses = Losses()
    run = fresh_run(output, spec.name)
    found = Hosts(spec, build, said.append, run.folder)
    try:
        found.load()
        rows = search(spec, run, found, [losses])
    finally:
        found.end()
    return rows, losses.of, said


def test_gpu_that_fails_has_no_trial_given_up_while_another_is_sound(ray: Any, tiny: Path, tmp_path: Path) -> None:
    """It fails anew whenever it has a host, and has room, while the other is full."""
    cores = int(ray.cluster_resources()["CPU"])
    hosts = {"cpus_per_host": cores // 2, "trials_per_host": 2, "max_retries": 1}
    rows, losses, said = searched(ray, tiny, tmp_path, build_second_is_sick, hosts, trials=16)
    assert {row["state"] for row in rows} == {"completed"}
    assert {row["host"] for row in rows} == {"host-0"}
    assert sum("an illegal memory access" in line for line in said) > 2, said
    assert set(losses.values()) == {1}  # of those that met with it


def test_trial_that_ends_its_hosts_is_given_up_and_none_beside_it(ray: Any, tiny: Path, tmp_path: Path) -> None:
    hosts = {"count": 1, "cpus_per_host": 1, "trials_per_host": 4, "max_retries": 2}
    rows, losses, said = searched(ray, tiny, tmp_path, build_harmed, hosts, trials=6)
    states = {row["trial"]: row["state"] for row in rows}
    assert states == {trial: "failed" if trial == 1 else "completed" for trial in range(6)}
    assert re.fullmatch(r"given up after 2 retries: HostGone: host-\d: its process died", rows[1]["reason"])
    assert sum("was lost: its process died" in line for line in said) >= 3  # more, where it has gone as it came
    assert len(losses) >= 2  # those that were beside it


def test_trials_that_end_their_hosts_as_they_are_let_in_are_given_up_and_no_others(
    ray: Any, tiny: Path, tmp_path: Path
) -> None:
    hosts = {"count": 1, "cpus_per_host": 1, "trials_per_host": 3, "max_retries": 2}
    rows, _, said = searched(ray, tiny, tmp_path, build_fatal, hosts, trials=6)
    states = {row["trial"]: row["state"] for row in rows}
    assert states == {trial: "failed" if trial in (1, 3) else "completed" for trial in range(6)}
    for trial in (1, 3):
        assert re.fullmatch(r"given up after 2 retries: HostGone: host-\d+: its process died", rows[trial]["reason"])
    assert sum("was lost: its process died" in line for line in said) >= 3


NODES = [Node("node", 8, 8), Node("another", 8, 8)]


@pytest.mark.parametrize("loaded", [False, True], ids=["as they load the base", "as they train"])
def test_hosts_of_a_node_that_are_lost_together_count_once_and_it_rests_longer_each_time(
    monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    from lora_search.sweep import losses as module
    from lora_search.sweep.answers import HostLost
    from lora_search.sweep.running import RunningHost

    clock = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    eight = HostPlace("h", "node", 1, 1, neighbours=8)
    losses = module.Losses(lambda line: None)
    losses.has_trained = True
    rests = []
    rounds = 0
    while not losses.unfit(NODES):
        rounds += 1
        hosts = [RunningHost(eight, 1, None, None, None, None, clock[0], loaded=loaded) for _ in range(8)]  # type: ignore[arg-type]
        clock[0] += 5
        for host in hosts:
            losses.add(host, HostLost("the hub is busy"))
        rests.append(0)
        while losses.resting(NODES):
            clock[0] += 1
            rests[-1] += 1
    assert rounds == module.LOSSES_PER_NODE + 8 + 1
    assert rests[:7] == [0, 20, 40, 80, 160, 320, 600]
    assert rests[7:] == [600] * (rounds - 7)


def test_node_on_which_trials_come_further_between_two_losses_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_search.sweep import losses as module
    from lora_search.sweep.answers import HostLost
    from lora_search.sweep.running import RunningHost

    clock = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def begun() -> RunningHost:
        place = HostPlace("h", "node", 1, 1)
        return RunningHost(place, 1, None, None, None, None, clock[0], loaded=True)  # type: ignore[arg-type]

    losses = module.Losses(lambda line: None)
    old = begun()
    for _ in range(5 * module.LOSSES_PER_NODE):
        host = begun()
        clock[0] += 5
        losses.add(host, HostLost("its process died"))
        clock[0] += 1000
        losses.trained(begun())
        losses.trained(old)  # which says nothing of what has come since
        assert not losses.resting(NODES)
    for _ in range(module.LOSSES_PER_NODE + 2):
        assert not losses.unfit(NODES)
        host = begun()
        clock[0] += 5
        losses.add(host, HostLost("its process died"))
        losses.trained(old)
    assert losses.unfit(NODES) == {"node"}


def test_node_whose_hosts_are_lost_shortly_one_after_the_other_rests_though_trials_come_further_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with a GPU that fails every few minutes: some quick trial gets through, and the same others do not."""
    from lora_search.sweep import losses as module
    from lora_search.sweep.answers import HostLost
    from lora_search.sweep.running import RunningHost

    clock = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    losses = module.Losses(lambda line: None)
    rests = []
    for wait in (120.0,) * 7 + (module.QUIET_S, 120.0):
        clock[0] += wait
        host = RunningHost(HostPlace("h", "node", 1, 1), 1, None, None, None, None, clock[0], loaded=True)  # type: ignore[arg-type]
        clock[0] += 5
        losses.trained(host)
        losses.add(host, HostLost("its process died"))
        began = clock[0]
        while losses.resting(NODES):
            clock[0] += 1
        rests.append(clock[0] - began)
    assert rests == [0, 20, 40, 80, 160, 320, 600, 0, 20]
    assert not losses.unfit(NODES)


def test_machine_that_leaves_and_joins_again_is_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray calls it another node each time; where two living nodes have one name, Ray's is all there is."""
    from lora_search.sweep import cluster, shunned
    from lora_search.sweep import losses as module
    from lora_search.sweep.answers import HostLost
    from lora_search.sweep.running import RunningHost

    known: list[dict[str, Any]] = []
    monkeypatch.setattr(cluster, "ray", SimpleNamespace(nodes=lambda: known))

    def joins(node: str, name: str) -> None:
        for other in known:
            other["Alive"] &= other["NodeManagerHostname"] != name
        known.append({"NodeID": node, "Alive": True, "Resources": {"CPU": 1.0}, "NodeManagerHostname": name})

    said: list[str] = []
    losses, kept_off = module.Losses(said.append), shunned.Shunned()
    losses.has_trained = True
    joins("sound", "beside")
    for number in range(module.LOSSES_PER_NODE + 2):
        assert not losses.unfit(cluster.nodes())
        joins(f"flaps-{number}", "flaps")
        (place,) = (it for it in place_hosts(cluster.nodes(), Hosts()) if it.node == f"flaps-{number}")
        told = Told()
        host = RunningHost(replace(place, name=f"h{number}"), 1, told, None, None, None, module.time.monotonic())  # type: ignore[arg-type]
        kept_off.begun(host)
        assert told.out == ({"7"} if number else set())
        kept_off.lost(7, f"h{number}", [])
        losses.add(host, HostLost("its node is gone"))
        assert losses.resting(cluster.nodes()) == ({f"flaps-{number}"} if number else set())
    joins("flaps-again", "flaps")
    assert losses.unfit(cluster.nodes()) == {"flaps-again"}
    assert said[-1] == "WARNING: node flaps-6 gets no more hosts: it has lost 7"
    known.append({"NodeID": "two", "Alive": True, "Resources": {}, "NodeManagerHostname": "flaps"})
    assert losses.unfit(cluster.nodes()) == set()


class Told:
    """A host's actor, which is told whom not to take."""

    def __init__(self) -> None:
        self.out: set[str] = set()
        self.shun = SimpleNamespace(remote=self.out.add)
        self.welcome = SimpleNamespace(remote=self.out.remove)


def test_trial_is_kept_off_what_came_in_place_of_its_host_until_that_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_search.sweep import shunned as module
    from lora_search.sweep.running import RunningHost

    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    nodes = {"host-0": "a", "host-1": "a", "host-2": "b", "host-3": "a"}
    places = {name: HostPlace(name, node, 1, 1) for name, node in nodes.items()}
    hosts: dict[str, Any] = {
        name: RunningHost(place, 1, Told(), None, None, None, 0.0, loaded=True)  # type: ignore[arg-type]
        for name, place in places.items()
    }
    shunned = module.Shunned()

    def out() -> dict[str, set[str]]:
        shunned.look(there)
        return {host.place.name: host.actor.out for host in there if host.actor.out}

    there = [hosts[name] for name in ("host-1", "host-2")]  # as they began, together with host-0
    for name in ("host-0", "host-1", "host-2"):
        shunned.begun(hosts[name])
    shunned.lost(7, "host-0", there)
    assert out() == {}  # host-1 has another GPU
    there.append(hosts["host-3"])
    shunned.begun(hosts["host-3"])
    assert out() == {"host-3": {"7"}}
    shunned.lost(8, "host-0", there)
    assert out() == {"host-3": {"7", "8"}}
    shunned.reported(8, "host-2", there)
    assert out() == {"host-3": {"7"}}
    shunned.reported(9, "host-3", there)
    assert out() == {}
    shunned.lost(8, "host-0", there)
    assert out() == {"host-3": {"8"}}
    clock[0] += module.SHUNNED_S + 1
    assert out() == {}
    shunned.lost(8, "host-0", there)
    there[:] = [hosts["host-3"]]
    assert out() == {}  # where else?
