"""Seats: how they look for a host, and that no more of their processes are started than trials can run at once."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, make_spec, processes, wait_until
from test_host import CONFIG, CountingEngine, ranked

from lora_search.checkpoint import REPORTS, TRIAL, Checkpoint, Shelf, seal, step_of
from lora_search.doctor import _hosts
from lora_search.errors import HostFailed, HostGone, InputError, SweepError
from lora_search.host import Host
from lora_search.placement import HostPlace, Node
from lora_search.rundir import RunDirectory, create_run
from lora_search.seat import ASKED_AT_ONCE, LINES, Lobby, Seat
from lora_search.space import TrialConfig
from lora_search.spec import SweepSpec
from lora_search.storage import Folder
from lora_search.sweep.answers import DataLost, HostLost, NodeUnfit, is_done, unwrap
from lora_search.tracking import Observer

HOSTS = 2 * ASKED_AT_ONCE
NUMBERS = itertools.count()
PREFIX = "lora-search-of-a-test-"
PARAMS = {"rank": 4, "alpha_ratio": 2, "dropout": 0.0, "target_modules": "all-linear", "learning_rate": 1e-3}
FIRST = {"trial": 3, "params": PARAMS, "attempt": 0, "again": False, "alone": False}


class Asked(Host):
    """Counts how often it is asked for its room; holds one trial."""

    def __init__(self) -> None:
        super().__init__("host", 1, lambda data: CountingEngine())
        self._rooms = 0

    async def room(self) -> tuple[int, int]:
        self._rooms += 1
        return await super().room()

    async def asked(self) -> int:
        return self._rooms

    async def residents(self) -> set[str]:
        return set(self._residents)

    async def in_line(self, trial: str) -> bool:
        return self._waiting.knows(trial)


@dataclass
class Hosts:
    """As a sweep has them."""

    ray: Any
    actors: list[Any]

    def of(self, trial: str) -> list[int]:
        """Where a trial is resident."""
        residents = self.ray.get([actor.residents.remote() for actor in self.actors])
        return [index for index, trials in enumerate(residents) if trial in trials]

    def asked(self) -> int:
        return sum(self.asked_each())

    def asked_each(self) -> list[int]:
        return list(self.ray.get([actor.asked.remote() for actor in self.actors]))

    def lines(self, trial: str) -> list[bool]:
        """At which a trial waits in line."""
        return list(self.ray.get([actor.in_line.remote(trial) for actor in self.actors]))

    def release(self, trial: str) -> None:
        self.ray.get([actor.release.remote(trial) for actor in self.actors])


def hosts_of(ray: Any) -> Hosts:
    host = ray.remote(Asked)
    actors = [host.options(num_cpus=0, name=f"{PREFIX}{index}").remote() for index in range(HOSTS)]
    ray.get([actor.load.remote(None) for actor in actors])
    return Hosts(ray, actors)


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nodes that lose hosts again and again: tests/test_shunned.py has it."""
    monkeypatch.setattr("lora_search.sweep.losses.REST_S", 0.0)


@pytest.fixture(scope="module")
def started() -> Iterator[Hosts]:
    import ray

    from lora_search.sweep.cluster import cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # hosts import this file
        with cluster(None):
            yield hosts_of(ray)


@pytest.fixture
def hosts(started: Hosts) -> Iterator[Hosts]:
    yield started
    for trials in started.ray.get([actor.residents.remote() for actor in started.actors]):
        for trial in trials:
            started.release(trial)


def filled(hosts: Hosts, lobby: Lobby) -> list[str]:
    trials = [f"filling-{next(NUMBERS)}" for _ in range(HOSTS)]
    for trial in trials:
        lobby.admit(trial, CONFIG, None)
    assert sorted(place for trial in trials for place in hosts.of(trial)) == list(range(HOSTS))
    return trials


def test_one_host_with_room_among_full_ones_is_found(hosts: Hosts) -> None:
    trials = filled(hosts, Lobby(PREFIX))
    for gone in trials:
        (place,) = hosts.of(gone)
        hosts.release(gone)
        Lobby(PREFIX).admit(f"after {gone}", CONFIG, None)
        assert hosts.of(f"after {gone}") == [place]


def test_where_its_last_trial_has_ended_it_asks_first_and_few_others(hosts: Hosts) -> None:
    trials = filled(hosts, lobby := Lobby(PREFIX))
    hosts.release(trials[-1])
    before = hosts.asked()
    lobby.admit("next", CONFIG, None)
    assert hosts.asked() - before == ASKED_AT_ONCE


def test_trial_that_waited_everywhere_waits_nowhere_once_it_is_in(hosts: Hosts) -> None:
    trials = filled(hosts, Lobby(PREFIX))
    waiting = threading.Thread(target=Lobby(PREFIX).admit, args=("waiting", CONFIG, None))
    before = hosts.asked()
    waiting.start()
    wait_until(lambda: hosts.asked() - before > HOSTS)  # it has been refused everywhere, and asks again
    hosts.release(trials.pop())
    waiting.join(PATIENCE)
    assert len(hosts.of("waiting")) == 1
    hosts.release("waiting")
    late = threading.Thread(target=lambda: [Lobby(PREFIX).admit(f"late {trial}", CONFIG, None) for trial in "ab"])
    hosts.release(trials.pop())
    late.start()  # where the first one still waited, these would have to
    late.join(10)
    assert not late.is_alive()


def test_trial_waits_in_line_at_a_few_hosts_and_is_let_in_at_any(hosts: Hosts) -> None:
    """In line at all of them, the first of those that wait would be waited for wherever there is room."""
    trials = filled(hosts, Lobby(PREFIX))
    waiting = [f"waiting-{next(NUMBERS)}" for _ in trials]
    threads = [threading.Thread(target=Lobby(PREFIX).admit, args=(trial, CONFIG, None)) for trial in waiting]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(sum(hosts.lines(trial)) >= LINES for trial in waiting))
    before = hosts.asked()
    wait_until(lambda: hosts.asked() - before > 2 * HOSTS * len(waiting))  # they ask all others again
    assert {sum(hosts.lines(trial)) for trial in waiting} == {LINES}
    for trial in trials:
        hosts.release(trial)
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(place for trial in waiting for place in hosts.of(trial)) == list(range(HOSTS))
    wait_until(lambda: not any(any(hosts.lines(trial)) for trial in waiting))


def test_trial_asks_again_where_it_is_in_line_before_every_few_others(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts that keep their room for it would wait until it has been everywhere."""
    monkeypatch.setattr("lora_search.seat.LINES", 2)
    monkeypatch.setattr("lora_search.seat.ASKED_AT_ONCE", 2)
    trials = filled(hosts, Lobby(PREFIX))
    waiting = threading.Thread(target=Lobby(PREFIX).admit, args=("in line", CONFIG, None))
    waiting.start()
    wait_until(lambda: sum(hosts.lines("in line")) == 2)
    before = hosts.asked_each()
    wait_until(lambda: hosts.asked() - sum(before) > 20 * HOSTS)
    asked = [after - earlier for after, earlier in zip(hosts.asked_each(), before, strict=True)]
    lines = hosts.lines("in line")
    hosts.release(trials[0])
    waiting.join(PATIENCE)
    there, elsewhere = ([times for times, line in zip(asked, lines, strict=True) if line is on] for on in (True, False))
    assert min(there) > 2 * max(elsewhere)  # three times as often: it asks six others, two at a time
    hosts.release("in line")


def test_trial_that_lost_its_seat_leaves_the_host_that_it_was_on(hosts: Hosts) -> None:
    Lobby(PREFIX).admit("lost", CONFIG, None)
    (before,) = hosts.of("lost")
    Lobby(PREFIX).admit("lost", CONFIG, None, attempt=1, again=True)  # its place there is taken, by itself
    wait_until(lambda: before not in hosts.of("lost"))
    assert len(hosts.of("lost")) == 1


@pytest.mark.parametrize("larger", [True, False])
def test_trial_too_large_for_one_host_waits_for_a_larger_one_where_there_is_one(
    started: Hosts, larger: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as cards of two kinds: it is tried on the small one only where there is no other, nor comes one."""
    monkeypatch.setattr("lora_search.seat.LARGER_S", 0.5)
    ray, prefix = started.ray, f"lora-search-kinds-{larger}-"
    builds = {"small": lambda data: CountingEngine()} | ({"large": lambda data: RoomyEngine()} if larger else {})
    hosts = {
        name: ray.remote(Host).options(num_cpus=0, name=prefix + name).remote(name, 1, build)
        for name, build in builds.items()
    }
    try:
        ray.get([host.load.remote(None) for host in hosts.values()])
        if larger:
            assert ray.get(hosts["large"].admit.remote("there", CONFIG))
        waiting = threading.Thread(target=Lobby(prefix).admit, args=("waiting", ranked(200), None))
        waiting.start()
        if larger:
            waiting.join(1.0)
            assert waiting.is_alive()
            ray.get(hosts["large"].release.remote("there"))
        waiting.join(PATIENCE)
        assert not waiting.is_alive()
        places = {name: ray.get(host.room.remote())[0] for name, host in hosts.items()}
        assert places == ({"small": 1, "large": 0} if larger else {"small": 0})
    finally:
        for host in hosts.values():
            ray.kill(host)


class FailingEngine(CountingEngine):
    """Fails as soon as it is to hold a trial."""

    def admit(self, trial: str, config: TrialConfig, checkpoint: Checkpoint | None = None) -> None:
        raise HostFailed("CUDA error: an illegal memory access was encountered")


def test_host_that_fails_as_it_admits_a_trial_is_told_by_its_name(started: Hosts, tiny: Path, tmp_path: Path) -> None:
    ray, prefix = started.ray, "lora-search-failing-"
    host = ray.remote(Host).options(num_cpus=0, name=prefix + "host-7").remote("h", 1, lambda data: FailingEngine())
    spec = make_spec(tiny, name="failing", output=str(tmp_path))
    try:
        ray.get(host.load.remote(None))
        seat = Seat(FIRST, spec, fresh_run(tmp_path, "failing").folder, prefix)
        with pytest.raises(HostGone, match="host-7: CUDA error: an illegal memory access") as lost:
            seat.train()
        assert lost.value.host == "host-7"
    finally:
        ray.kill(host)


class RoomyEngine(CountingEngine):
    """Has memory for any trial."""

    def room(self, *more: TrialConfig) -> int:
        return 1

    def fits(self, config: TrialConfig) -> bool:
        return True


@dataclass
class IdleReport:
    step: int

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step, "eval_loss": 1.0 / self.step, "tokens": self.step, "history": []}


class IdleEngine(CountingEngine):
    """Takes no time for its steps, and has what a sweep wants to know."""

    def snapshot(self, trial: str) -> Checkpoint:
        return seal({"weights.bin": b""}, {"step": self.steps[trial]})

    def report(self, trials: Sequence[str]) -> dict[str, Any]:
        return {trial: IdleReport(self.steps[trial]) for trial in trials}


def fresh_run(output: Path, name: str) -> RunDirectory:
    """A run directory as hosts and seats find it."""
    run = create_run(output, name, exact=True)
    run.spec.touch()
    return run


def build_idle(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> IdleEngine:
    return IdleEngine()


def test_host_whose_cores_are_held_is_not_waited_for_and_joins_when_they_are_free(
    started: Hosts, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_search.sweep.beginning import WITHOUT
    from lora_search.sweep.hosts import Hosts as SweepHosts

    monkeypatch.setattr("lora_search.sweep.beginning.START_S", 5.0)
    ray = started.ray
    cores = int(ray.cluster_resources()["CPU"])
    holder = ray.remote(Host).options(num_cpus=cores // 2).remote("holder", 1, lambda data: CountingEngine())
    ray.get(holder.room.remote())
    spec = make_spec(tiny, name="held", hosts={"cpus_per_host": cores // 2}, output=str(tmp_path))
    said: list[str] = []
    run = fresh_run(tmp_path, spec.name)
    hosts = SweepHosts(spec, build_idle, said.append, run.folder)
    try:
        ray.wait(
            [host.started for host in hosts._running.values()], timeout=PATIENCE
        )  # where none does it says so first
        hosts.require_same_nodes()
        (line,) = said
        assert "the sweep goes on without some hosts: host-" in line
        assert f"wants {cores // 2} cores and 0 GPUs: something else on the cluster holds them" in line
        (begun,) = hosts._begun
        (held,) = (host for host in hosts._running.values() if host.late)
        ray.kill(begun.actor)  # its cores go to the one that has waited or, if Ray likes, to the one in its place
        wait_until(lambda: is_done(begun.alive))  # Ray kills in its own time: until then it answers
        hosts.load()
        assert len(hosts._ready) == 1
        (now,) = hosts._begun
        assert now.actor != begun.actor
        alone = hosts.capacity
        assert hosts.finish(lambda engine: "tested", lambda gpu, data: f"merged {gpu}") == (
            "tested",
            "merged False",
        )  # by that one
        assert hosts.save_all(run.folder) == []

        def one_waits() -> bool:
            hosts.look()  # where the one that had waited runs, this puts another in its place
            return sorted(host.late for host in hosts._running.values()) == [False, True]

        wait_until(one_waits)
        (late,) = (host for host in hosts._running.values() if host.late)
        monkeypatch.setattr("lora_search.doctor.NODE_ANSWERS_S", 5.0)
        (waiting,) = (check for check in _hosts() if check.state != "ok")
        assert (waiting.what, waiting.state) == (hosts.prefix + late.place.name, "note")
        assert waiting.found == "does not answer: it waits for cores or GPUs that something else holds, or hangs"
        ray.kill(holder)

        def joined() -> bool:
            hosts.look()
            return len(hosts._ready) == 2

        wait_until(joined)
        assert hosts.capacity == 2 * alone
        assert len(set(hosts.ask_all(os.getpid))) == 2
        hosts.check = other_weights
        node = hosts._begun[0].place.node[:8]
        monkeypatch.setattr("lora_search.sweep.beginning.START_S", 60.0)  # however slowly this one starts
        ray.kill(hosts._begun[0].actor)  # the one in its place does not pass

        def refused() -> bool:
            hosts.look()
            return f"WARNING: node {node} is of no use: it has other weights" in said

        wait_until(refused)
        told = [line.removeprefix(WITHOUT).split()[0] for line in said if line.startswith(WITHOUT)]
        assert told == list(dict.fromkeys([held.place.name, late.place.name]))  # of each once, however often it looked
    finally:
        hosts.end()
    assert not list(run.path.glob(".probe-*"))


def test_no_more_trials_are_proposed_than_memory_allows_the_hosts(started: Hosts, tiny: Path, tmp_path: Path) -> None:
    from lora_search.sweep.hosts import Hosts as SweepHosts

    placed = {"count": 1, "cpus_per_host": 1, "trials_per_host": 4}
    spec = make_spec(tiny, name="small", hosts=placed, output=str(tmp_path))
    hosts = SweepHosts(spec, build_small)
    try:
        assert hosts.capacity == 4
        hosts.load()
        assert hosts.capacity == 3
        (host,) = hosts.actors
        assert started.ray.get(host.room.remote())[0] == 3

        def is_heard() -> bool:
            hosts.look()
            return hosts.capacity == 2

        assert started.ray.get(host.admit.remote("a", CONFIG))
        started.ray.get(host.advance.remote("a", 1))  # after which it knows that fewer fit than had been reckoned
        wait_until(is_heard)
        assert [facts["capacity"] for facts in hosts.facts] == [2]
    finally:
        hosts.end()


def test_host_that_cannot_load_the_base_or_takes_too_long_holds_up_no_other(
    started: Hosts, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins anew beside the sweep, and passes what hosts have to that come later."""
    from lora_search.sweep.hosts import Hosts as SweepHosts

    cores = int(started.ray.cluster_resources()["CPU"])
    placed = {"cpus_per_host": cores // 2}
    for name, build, load_s, why in (
        ("hub", build_first_is_refused, PATIENCE, "the hub is busy"),
        ("slow", build_first_is_slow, 1.0, "it takes far longer than another to load the base, and begins anew"),
    ):
        monkeypatch.setattr("lora_search.sweep.running.LOAD_S", load_s)
        spec = make_spec(tiny, name=name, hosts=placed, output=str(tmp_path))
        said: list[str] = []
        hosts = SweepHosts(spec, build, said.append)

        def refused(hosts: SweepHosts = hosts, said: list[str] = said) -> bool:
            hosts.look()
            return any("is of no use: it has other weights" in line for line in said)

        def are_two(hosts: SweepHosts = hosts) -> bool:
            hosts.look()
            return len(hosts._ready) == 2

        try:
            hosts.load()
            assert [host.place.name for host in hosts._ready] == ["host-1"]
            early, lost = said[:-1], said[-1]
            assert set(early) <= {f"WARNING: host-0 has not loaded the base: {why}; waits for host-1"}
            assert lost == f"host-0 was lost: {why}"
            hosts.check = other_weights
            wait_until(refused)
            hosts.check = None
            hosts._losses._unfit.clear()
            wait_until(are_two)
            assert [host.place.name for host in hosts._ready] == ["host-1", "host-3"]
            told = {facts["name"]: (facts.get("lost"), facts["since"] is not None) for facts in hosts.facts}
            refusal = "it has other weights"
            assert told == {
                "host-0": (why, False),
                "host-1": (None, True),
                "host-2": (refusal, False),
                "host-3": (None, True),
            }
        finally:
            hosts.end()
    hosts = SweepHosts(spec, build_refused, said.append)
    try:
        with pytest.raises(InputError, match="the hub is busy"):
            hosts.load()
    finally:
        hosts.end()


def test_host_that_cannot_load_the_base_is_told_of_while_another_still_loads_it(
    started: Hosts, tiny: Path, tmp_path: Path
) -> None:
    """The user may not want to wait for it."""
    from lora_search.sweep.hosts import Hosts as SweepHosts

    cores = int(started.ray.cluster_resources()["CPU"])
    spec = make_spec(tiny, name="told", hosts={"cpus_per_host": cores // 2}, output=str(tmp_path))
    said: list[str] = []
    hosts = SweepHosts(spec, build_first_is_refused_others_wait, said.append)
    loading = threading.Thread(target=hosts.load)
    loading.start()
    try:
        wait_until(lambda: bool(said))
        assert loading.is_alive()
        assert said == ["WARNING: host-0 has not loaded the base: the hub is busy; waits for host-1"]
        (tmp_path / "go").touch()
        loading.join(PATIENCE)
        assert said[1:] == ["host-0 was lost: the hub is busy"]
        assert [host.place.name for host in hosts._ready] == ["host-1"]
    finally:
        hosts.end()


def build_first_is_refused_others_wait(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> IdleEngine:
    while place.name != "host-0" and not (Path(spec.output) / "go").exists():
        time.sleep(0.05)
    return build_first_is_refused(spec, place, capacity, data)


def build_refused(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> IdleEngine:
    raise InputError("the hub is busy")


def build_first_is_refused(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> IdleEngine:
    return build_refused(spec, place, capacity, data) if place.name == "host-0" else IdleEngine()


def build_first_is_slow(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> IdleEngine:
    time.sleep(PATIENCE if place.name == "host-0" else 0)
    return IdleEngine()


class HangingEngine(CountingEngine):
    """Hangs in its first step, until it is ended."""

    def step(self, trials: Sequence[str]) -> dict[str, Any]:
        time.sleep(PATIENCE)
        return {}


def build_hanging(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> CountingEngine:
    return HangingEngine()


def test_host_that_hangs_is_told_of_once(
    started: Hosts, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_search.sweep.hosts import Hosts as SweepHosts

    monkeypatch.setattr("lora_search.sweep.running.STUCK_S", 2.0)
    monkeypatch.setattr("lora_search.sweep.running.ASK_S", 0.2)
    monkeypatch.setattr("lora_search.sweep.hosts.LOOK_EVERY_S", 0.1)
    said: list[str] = []
    hosts = SweepHosts(
        make_spec(tiny, name="hangs", hosts={"count": 1}, output=str(tmp_path)), build_hanging, said.append
    )

    def is_told() -> bool:
        hosts.look()
        return bool(said)

    try:
        hosts.load()
        (host,) = hosts.actors
        assert started.ray.get(host.admit.remote("a", CONFIG))
        time.sleep(2.5)  # it waits for something to do, which is no hanging
        assert not is_told()
        training = host.advance.remote("a", 1)
        wait_until(is_told)
        for _ in range(10):
            time.sleep(0.1)
            hosts.look()
        (line,) = said
        pid = hosts.facts[0]["pid"]
        assert line.startswith("WARNING: host-0 on node ")
        assert " has been at one thing for 0 min: its device, its disk or its network may hang." in line
        assert f"end its process ({pid}): its trials go on elsewhere" in line
        del training
    finally:
        hosts.end()


class SmallEngine(CountingEngine):
    """Has memory for three trials, it thinks, and finds out that it is for two."""

    def ever(self) -> int | None:
        return 3

    def step(self, trials: Sequence[str]) -> dict[str, Any]:
        self.pack_limit = 2
        return super().step(trials)

    def report(self, trials: Sequence[str]) -> dict[str, Any]:
        return {trial: IdleReport(self.steps[trial]) for trial in trials}


def build_small(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> SmallEngine:
    return SmallEngine()


class LessensEngine(IdleEngine):
    """Takes its time until there are two trials, and with them, and finds out that they are too many."""

    def step(self, trials: Sequence[str]) -> dict[str, Any]:
        if len(self.steps) == 2:
            self.pack_limit = 1
        if len(self.steps) == 2 or self.pack_limit is None:
            time.sleep(0.5)
        return super().step(trials)


def build_lessens(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> LessensEngine:
    return LessensEngine()


def test_trials_whose_seats_are_lost_hold_no_places_that_others_wait_for(
    started: Hosts, tiny: Path, tmp_path: Path
) -> None:
    """The first is asked for again alone, and has to find the only place free that there is now."""
    from lora_search.sweep.hosts import Hosts as SweepHosts
    from lora_search.sweep.trials import search

    class Kills(Observer):
        def tick(self) -> None:
            if time.monotonic() > until:  # no trial comes any more
                signal.raise_signal(signal.SIGTERM)
            if hosts.capacity == 1 and not killed:
                for seat in processes("ray::Seat"):
                    os.kill(seat, signal.SIGKILL)
                    killed.append(seat)

    until, killed = time.monotonic() + PATIENCE, list[int]()
    spec = make_spec(
        tiny,
        name="lessens",
        hosts={"count": 1, "trials_per_host": 2},
        search={"trials": 2, "sampler": {"name": "random"}, "scheduler": {"name": "none"}},
        training={"steps": 60, "eval_every": 20},
        output=str(tmp_path),
    )
    hosts = SweepHosts(spec, build_lessens)
    try:
        hosts.load()
        rows = search(spec, fresh_run(tmp_path, spec.name), hosts, [Kills()])
    finally:
        hosts.end()
    assert len(killed) >= 2
    assert [row["state"] for row in rows] == ["completed"] * 2, rows


def test_hosts_lost_all_at_once_are_replaced_and_one_lost_at_the_end_leaves_the_others(
    started: Hosts, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many hosts a node has: each may be lost so often. And what a single one loses costs no other."""
    from lora_search.sweep.hosts import Hosts as SweepHosts

    monkeypatch.setattr("lora_search.sweep.losses.LOSSES_PER_NODE", 2)
    ray = started.ray
    cores = int(ray.cluster_resources()["CPU"])
    spec = make_spec(tiny, name="many", hosts={"cpus_per_host": cores // 2}, output=str(tmp_path))
    said: list[str] = []
    hosts = SweepHosts(spec, build_idle, said.append)

    def kill_all() -> None:
        for host in hosts._ready:
            ray.kill(host.actor)

    def two_are_ready() -> bool:
        hosts.look()
        return len(hosts._ready) == 2

    def others_are_ready() -> bool:
        return two_are_ready() and not {"host-0", "host-1"} & hosts._running.keys()

    def test(engine: Any) -> str:
        return "tested"

    def merge(gpu: bool, data: Any) -> str:
        return "merged"

    try:
        hosts.require_same_nodes()
        hosts.load()
        kill_all()
        wait_until(others_are_ready)
        first, _ = hosts.actors
        with pytest.raises(HostLost):
            hosts.finish(test, lambda gpu, data: os._exit(1))
        assert "host-3 was lost: " in said[-1]
        assert said[-1].endswith("; what it did is done again")
        hosts.renew()
        assert hosts.actors == (first,)
        assert hosts.finish(test, merge) == ("tested", "merged")
        assert ray.get(first.load.remote(None))
        wait_until(two_are_ready)
        with pytest.raises(HostLost):
            hosts.finish(test, lambda gpu, data: os._exit(1))
        ray.kill(first)  # as a node's hosts go together: it does not count as one that could go on
        wait_until(lambda: is_done(hosts._ready[0].alive))
        hosts.renew()
        assert hosts.actors == ()
        assert hosts.finish(test, merge) == ("tested", "merged")
        wait_until(two_are_ready)
        assert ray.get(hosts.actors[0].load.remote(None))
        with pytest.raises(HostLost):
            hosts.finish(lambda engine: os._exit(1), merge)
        assert hosts.actors == ()  # and the merge of before cannot be in the way of the next
        hosts.renew()
        assert hosts.finish(test, merge) == ("tested", "merged")
        wait_until(two_are_ready)
        first, last = hosts.actors
        data = first.run.remote(os._exit, 1)
        with pytest.raises(DataLost):
            unwrap(last.run.remote(str, data))
        kill_all()
        with pytest.raises(SweepError, match="all hosts were lost"):
            wait_until(lambda: hosts.look() is not None)
        assert f"WARNING: node {ray.nodes()[0]['NodeID'][:8]} gets no more hosts: it has lost 5" in said
    finally:
        hosts.end()


def test_data_lost_with_their_host_are_prepared_by_one_that_can_and_else_the_sweep_ends(
    started: Hosts, tiny: Path, tmp_path: Path
) -> None:
    """Not by host after host: where their files are missing, no other host of the node has them either."""
    from lora_search.sweep.hosts import Hosts as SweepHosts

    ray = started.ray
    cores = int(ray.cluster_resources()["CPU"])
    spec = make_spec(tiny, name="lost", hosts={"cpus_per_host": cores // 2}, output=str(tmp_path))
    said: list[str] = []
    gone: list[Any] = []
    hosts = SweepHosts(spec, build_idle, said.append)

    def lose_the_data() -> None:
        """As a node takes them along: what the host that had prepared them answers is no more, and so is that host."""
        first = hosts._ready[0]
        assert hosts._data._newest is not None
        gone.append(first.actor.run.remote(os._exit, 1))
        hosts._data._newest = replace(hosts._data._newest, data=gone[-1])

    def are_ready(*names: str) -> bool:
        hosts.look()
        return tuple(host.place.name for host in hosts._ready) == names

    try:
        assert hosts.prepare(prepare_where_possible, int) == "10 rows"
        hosts.load()
        lose_the_data()
        wait_until(lambda: are_ready("host-1", "host-3"))
        assert "host-2 was lost: a device computes no longer" in said
        lose_the_data()
        wait_until(lambda: are_ready("host-3") and any("is of no use" in line for line in said))
        node = ray.nodes()[0]["NodeID"][:8]
        why = "the data there are not those that the sweep began with"
        assert said[-1] == f"WARNING: node {node} is of no use: {why}"
        (ready,) = hosts._ready  # it has all it needs
        assert ready.given is not None
        hosts._data._newest = ready.given = replace(ready.given, data=gone[-1])
        with pytest.raises(DataLost):
            hosts.finish(lambda engine: "tested", lambda gpu, data: data)
        done = ("tested", "the data of host-3")
        assert hosts.finish(lambda engine: "tested", lambda gpu, data: data) == done
        ray.kill(hosts.actors[0])
        with pytest.raises(SweepError, match="all hosts were lost"):
            wait_until(lambda: are_ready(""))
        assert sum("starts on node" in line for line in said) == 3
    finally:
        hosts.end()


def prepare_where_possible(place: HostPlace) -> tuple[str, str]:
    if place.name == "host-2":
        raise HostFailed("a device computes no longer")
    if place.name == "host-4":
        return "11 rows", "other data"
    return "10 rows", f"the data of {place.name}"


def test_output_that_nodes_do_not_see_ends_the_sweep_before_it_begins(
    started: Hosts, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_search.sweep.build import greet
    from lora_search.sweep.hosts import Hosts as SweepHosts

    monkeypatch.setattr("lora_search.sweep.build.SEEN_S", 0.0)
    _, unseen = greet(Folder(tmp_path / "elsewhere"))
    assert unseen == f"{tmp_path / 'elsewhere'} is not there"
    (tmp_path / "a file").touch()
    spec = make_spec(tiny, name="unseen", hosts={"count": 2}, output="runs")
    hosts = SweepHosts(spec, build_idle, run=SeenByOne(tmp_path / "run"))
    started.ray.get([host.started for host in hosts._running.values()])
    monkeypatch.setattr("lora_search.sweep.beginning.START_S", 0.5)  # it runs: how long it takes to answer is no matter
    try:
        with pytest.raises(InputError, match=r"output: found 'runs', which not every node can use \(node \w{8}: far\)"):
            hosts.require_same_nodes()
    finally:
        hosts.end()


class SeenByOne(Folder):
    """A folder that one host sees, and no other, which it learns only after some time."""

    def __reduce__(self) -> Any:
        return SeenByOne, (self.place,)

    def names(self) -> list[str]:
        try:
            Path(self.place).mkdir()
        except FileExistsError:
            time.sleep(3)
            raise OSError("far") from None
        return ["sweep.yaml"]


def test_host_that_does_not_run_is_waited_for_once(hosts: Hosts) -> None:
    pending = hosts.ray.remote(Asked).options(num_cpus=10_000, name=f"{PREFIX}pending").remote()
    try:
        lobby, seconds = Lobby(PREFIX), []
        for _ in range(2):
            began = time.monotonic()
            rooms = lobby._rooms([f"{PREFIX}0", f"{PREFIX}pending"])
            seconds.append(time.monotonic() - began)
            assert [name for _, name in rooms] == [f"{PREFIX}0"]
        assert seconds[1] < seconds[0] / 2
    finally:
        hosts.ray.kill(pending)


def test_host_whose_node_went_before_it_started_is_passed_over(hosts: Hosts) -> None:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gone = NodeAffinitySchedulingStrategy(hosts.ray.nodes()[0]["NodeID"][:-4] + "0000", soft=False)
    lobby = Lobby(PREFIX)
    lobby._known["gone"] = hosts.ray.remote(Asked).options(num_cpus=0, scheduling_strategy=gone).remote()
    assert [name for _, name in lobby._rooms(["gone", f"{PREFIX}0"])] == [f"{PREFIX}0"]


def test_seat_clears_away_the_checkpoints_of_a_trial_that_had_its_number(
    started: Hosts, tiny: Path, tmp_path: Path
) -> None:
    """The study had lost that trial. Its checkpoints are of later steps, and would be taken for the newer ones."""
    shelf = Shelf(Folder(tmp_path), 7)
    for step in (2, 4):
        shelf.put(seal({"weights.bin": b"lost"}, {"step": step}), {"rank": 8}, [{"step": step}])
    shelf.put_unreported(seal({"weights.bin": b"lost"}, {"step": 5}), {"rank": 8})  # when the sweep was interrupted
    saved = shelf.newest()
    assert saved is not None
    assert (saved.parameters, saved.reports) == ({"rank": 8}, [{"step": 4}])
    spec = make_spec(tiny, name="number", training={"steps": 4, "eval_every": 2}, output=str(tmp_path))
    host = started.ray.remote(Host).options(num_cpus=0, name="lora-search-number-0").remote("h", 1, build_counting)
    started.ray.get(host.load.remote(None))
    seat = Seat(
        {"trial": 7, "params": PARAMS, "attempt": 0, "again": False, "alone": False},
        spec,
        Folder(tmp_path),
        "lora-search-number-",
    )
    assert "resumed" not in seat.train()
    assert [path.name for path in (tmp_path / "tune" / "trial-0007").iterdir()] == ["checkpoint_000002"]
    saved = shelf.newest()
    assert saved is not None
    assert saved.parameters == PARAMS
    started.ray.kill(host)


def test_trial_that_is_interrupted_twice_between_reports_tells_all_again_and_goes_on_to_the_next(
    started: Hosts, tiny: Path, tmp_path: Path
) -> None:
    """Its study and its record may have lost what it had told: an object store has what was uploaded last."""
    training, search = {"steps": 40, "eval_every": 10}, {"scheduler": {"name": "none"}}
    spec = make_spec(tiny, name="told", training=training, search=search, output=str(tmp_path))
    run = fresh_run(tmp_path, "told").folder
    host = started.ray.remote(Host).options(num_cpus=0, name="lora-search-told-0").remote("h", 1, build_resuming)
    try:
        started.ray.get(host.load.remote(None))
        seat = Seat(FIRST, spec, run, "lora-search-told-")
        assert seat.train()["step"] == 10
        for step in (14, 17, 18):
            Shelf(run, 3).put_unreported(seal({"weights.bin": b""}, {"step": step}), PARAMS)
        seat.reset(FIRST | {"again": True})
        first, second = seat.train(), seat.train()
        assert (first["step"], first["resumed"]) == (10, {"step": 18, "damaged": []})
        assert second["step"] == 20
        started.ray.get(host.save_all.remote(run))
        saved = Shelf(run, 3).newest()
    finally:
        started.ray.kill(host)
    assert saved is not None
    assert saved.parameters == PARAMS
    assert [report["step"] for report in saved.reports] == [10, 20]


def test_checkpoints_that_a_host_keeps_of_a_trial_without_a_report_tell_its_parameters(
    started: Hosts, tmp_path: Path
) -> None:
    """Its number may be another trial's by the time the sweep goes on."""
    host = started.ray.remote(Host).options(num_cpus=0, name="lora-search-new-0").remote("h", 1, build_resuming)
    try:
        started.ray.get(host.load.remote(None))
        Lobby("lora-search-new-").admit("3", CONFIG, None, {"rank": 8})
        assert started.ray.get(host.save_all.remote(Folder(tmp_path))) == [(3, 0, "tune/trial-0003/checkpoint_000000")]
    finally:
        started.ray.kill(host)
    saved = Shelf(Folder(tmp_path), 3).newest()
    assert saved is not None
    assert saved.parameters == {"rank": 8}


def test_checkpoints_that_cannot_be_read_for_a_moment_are_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a file server is out of reach: else the trial would begin over again, and its checkpoints would go."""
    shelf = Shelf(Folder(tmp_path), 0)
    for step in (10, 20):
        shelf.put(seal({"weights.bin": b"good"}, {"step": step}), {"rank": 8}, [{"step": step}])
    for number in (errno.ESTALE, errno.EACCES, errno.ETIMEDOUT, errno.EIO):
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "read", raises(OSError(number, os.strerror(number))))
            with pytest.raises(OSError, match=os.strerror(number)) as raised:
                shelf.newest()
            assert raised.value.errno == number
            with pytest.raises(OSError, match=os.strerror(number)):
                shelf.put_unreported(seal({"weights.bin": b"anew"}, {"step": 15}), None)
    saved = shelf.newest()
    assert saved is not None
    assert (saved.reports, saved.damaged) == ([{"step": 20}], ())


def test_checkpoint_of_which_the_disk_cannot_read_a_part_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its trial would never go on, nor the sweep: it is read anew at each try."""
    shelf = Shelf(Folder(tmp_path), 0)
    for step in (10, 20):
        shelf.put(seal({"weights.bin": b"good"}, {"step": step}), {"rank": 8}, [{"step": step}])
    bad, read = tmp_path / "tune" / "trial-0000" / "checkpoint_000020", Folder.read

    def fails_at_one(folder: Folder, name: str) -> bytes:
        if folder.place == str(bad) and name == "weights.bin":
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)
        return read(folder, name)

    monkeypatch.setattr(Folder, "read", fails_at_one)
    saved = shelf.newest()
    assert saved is not None
    assert saved.reports == [{"step": 10}]
    assert saved.damaged == (f"{bad}: the checkpoint cannot be read: [Errno 5] Input/output error: 'weights.bin'",)
    shelf.put(seal({"weights.bin": b"good"}, {"step": 15}), {"rank": 8}, [{"step": 15}])
    assert sorted(path.name for path in bad.parent.iterdir()) == ["checkpoint_000010", "checkpoint_000015"]


def test_old_checkpoint_that_cannot_go_stays_until_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(Folder(tmp_path), 0)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "remove", raises(OSError(errno.ENOTEMPTY, "Directory not empty")))  # NFS, a file is open
        for step in (10, 20, 30):
            shelf.put(seal({"weights.bin": b""}, {"step": step}), {}, [{"step": step}])
    assert len(shelf._names()) == 3
    shelf.put(seal({"weights.bin": b""}, {"step": 40}), {}, [{"step": 40}])
    assert shelf._names() == ["checkpoint_000030", "checkpoint_000040"]


def raises(error: Exception) -> Callable[..., Any]:
    def fail(*given: Any) -> Any:
        raise error

    return fail


class Unwritable(Folder):
    """A folder in which nothing can be written."""

    number = errno.EROFS

    def __reduce__(self) -> Any:
        return type(self), (self.place,)

    def below(self, name: str) -> Folder:
        return type(self)(super().below(name).place)

    def write(self, name: str, content: bytes) -> None:
        raise OSError(self.number, os.strerror(self.number))


class OutOfReach(Folder):
    """A folder that a node does not see any more."""

    def __reduce__(self) -> Any:
        return OutOfReach, (self.place,)

    def names(self) -> list[str]:
        raise OSError("far")


class FullFolder(Unwritable):
    number = errno.ENOSPC


@pytest.mark.parametrize(
    ("kind", "why", "here_alone"),
    [
        (Folder, "there is no run directory", True),
        (Unwritable, "Read-only file system", True),
        (FullFolder, "No space left on device", False),
    ],
)
def test_seat_that_cannot_use_the_run_directory_says_so_and_on_which_node(
    started: Hosts, tiny: Path, tmp_path: Path, kind: type[Folder], why: str, here_alone: bool
) -> None:
    """A trial whose checkpoints are out of sight would begin over again, and nobody would find what it leaves."""
    if kind is not Folder:
        (tmp_path / "sweep.yaml").touch()
    spec = make_spec(tiny, name="blind", training={"steps": 4, "eval_every": 2}, output=str(tmp_path))
    host = started.ray.remote(Host).options(num_cpus=0, name="lora-search-blind-0").remote("h", 1, build_counting)
    try:
        started.ray.get(host.load.remote(None))
        seat = Seat(
            {"trial": 3, "params": PARAMS, "attempt": 0, "again": False, "alone": False},
            spec,
            kind(tmp_path),
            "lora-search-blind-",
        )
        said = seat.train()
        assert why in said.pop("unsaved")
        assert said == {"step": 0, "node": started.ray.nodes()[0]["NodeID"] if here_alone else None}
        with pytest.raises(OSError, match=why):  # which is how Ray Tune learns that it is to go on elsewhere
            seat.train()
        assert not (tmp_path / "tune").exists()
    finally:
        started.ray.kill(host)


def test_node_that_cannot_use_the_run_directory_gets_no_seat_until_it_can(
    started: Hosts, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the sweep itself cannot, or a trial finds none that can, the sweep ends: no trial is failed for that."""
    from lora_search.sweep.hosts import Hosts as SweepHosts
    from lora_search.sweep.soundness import UNSAVED

    monkeypatch.setattr("lora_search.sweep.soundness.ASK_AGAIN_S", 0.5)
    spec = make_spec(tiny, name="doubted", hosts={"count": 1}, output=str(tmp_path))
    run = fresh_run(tmp_path, spec.name)
    said: list[str] = []
    hosts = SweepHosts(spec, build_idle, said.append, run.folder)
    try:
        hosts.require_same_nodes()
        node = started.ray.nodes()[0]["NodeID"]
        assert not hosts.barred
        hosts.unsaved(0, "Stale file handle", node)
        warning = (
            f"WARNING: node {node[:8]} cannot use the run directory: Stale file handle; its trials go on elsewhere"
        )
        assert said == [warning]
        assert hosts.barred == {node}
        wait_until(lambda: hosts.look() or not hosts.barred)
        with pytest.raises(SweepError, match=r"cannot be written to: No space left on device; mend it, then --resume"):
            hosts.unsaved(0, "No space left on device", None)
        assert said[1:] == [f"node {node[:8]} is of use by now"]
        assert [hosts.excuses(0), hosts.excuses(0)] == [True, False]  # it is not the trial's fault
        hosts.lost(2, "host-0", "out of memory at step 3, with 4 trials resident")
        assert [hosts.excuses(2), hosts.excuses(2)] == [True, False]
        hosts.unsaved(1, "Input/output error", node)
        hosts.reported(1, "host-0")
        for _ in range(UNSAVED):
            hosts.unsaved(1, "Input/output error", node)
        with pytest.raises(SweepError, match=r"cannot be written to: Input/output error; mend it, then --resume"):
            hosts.unsaved(1, "Input/output error", node)  # wherever the trial goes
        hosts._soundness._run = Folder(run.spec)  # a file
        with pytest.raises(SweepError, match=r"cannot be written to: Stale file handle; mend it, then --resume"):
            hosts.unsaved(0, "Stale file handle", node)
    finally:
        hosts.end()


def test_node_that_was_sound_is_asked_until_it_is_so_again(
    started: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_search.sweep.soundness import Soundness

    monkeypatch.setattr("lora_search.sweep.soundness.ASK_AGAIN_S", 0.0)
    node = started.ray.nodes()[0]["NodeID"]
    there = [Node(node, 1, 0), Node("another", 1, 0)]
    run = fresh_run(tmp_path, "sound")
    said: list[str] = []
    nodes = Soundness(said.append, OutOfReach(run.path))  # as this one sees it
    nodes.add(node, "another")
    monkeypatch.setattr(Folder, "check", lambda self: None)  # the driver can use it
    for _ in range(2):
        nodes.unsaved(0, "far", node)
    doubt = f"WARNING: node {node[:8]} cannot use the run directory: far; its trials go on elsewhere"
    no_use = f"WARNING: node {node[:8]} is of no use: it cannot use the run directory: far"
    answers: list[Any] = []

    def is_asked(times: int) -> bool:
        nodes.look(there, ())
        if (answer := nodes._asked[node]) is not None and answer not in answers:
            answers.append(answer)
        return len(answers) >= times

    wait_until(lambda: is_asked(3))
    assert said == [doubt, no_use]  # once each
    assert nodes.barred == {node}
    nodes._run = run.folder
    wait_until(lambda: is_asked(0) and not nodes.barred)
    assert said[2:] == [f"node {node[:8]} is of use by now"]
    nodes._run = OutOfReach(run.path)
    nodes.unsaved(0, "far", node)
    with pytest.raises(SweepError, match="no node is left that can use the run directory; mend it, then --resume"):
        wait_until(lambda: nodes.look(there[:1], ()) is not None)
    assert said[3:] == [doubt, no_use]


def test_what_a_node_was_asked_before_it_was_doubted_says_nothing_of_it(
    started: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_search.sweep.soundness import Soundness

    node = started.ray.nodes()[0]["NodeID"]
    there = [Node(node, 1, 0)]
    monkeypatch.setattr("lora_search.sweep.soundness.ASK_AGAIN_S", 0.0)
    nodes = Soundness(lambda line: None, fresh_run(tmp_path, "before").folder)
    nodes.doubt(node)
    wait_until(lambda: nodes.look(there, ()) is not None or nodes._asked[node] is not None)
    before = nodes._asked[node]
    wait_until(lambda: is_done(before))  # that it is sound
    monkeypatch.setattr("lora_search.sweep.soundness.ASK_AGAIN_S", PATIENCE)
    nodes.doubt(node)
    nodes.look(there, ())
    assert nodes.barred == {node}
    assert nodes.doubted == {node}


def test_node_that_cannot_use_the_run_directory_yet_is_asked_and_gets_hosts_when_it_can(
    started: Hosts, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a machine joins before its file server is mounted."""
    from lora_search.sweep.hosts import Hosts as SweepHosts
    from lora_search.sweep.soundness import Soundness

    monkeypatch.setattr("lora_search.sweep.soundness.ASK_AGAIN_S", 0.5)
    node = started.ray.nodes()[0]["NodeID"]
    there = [Node(node, 1, 0), Node("another", 1, 0)]
    run = fresh_run(tmp_path, "early")
    far = "it cannot use the run directory: far"
    said: list[str] = []
    nodes = Soundness(said.append, OutOfReach(run.path))
    nodes.add("another")
    wait_until(lambda: nodes.look(there, ()) is not None or bool(said))
    assert said == [f"WARNING: node {node[:8]} is of no use: {far}"]
    nodes._run = run.folder
    wait_until(lambda: nodes.look(there, ()) is not None or not nodes.barred)
    assert said[1:] == [f"node {node[:8]} is of use by now"]

    cores = int(started.ray.cluster_resources()["CPU"])
    spec = make_spec(tiny, name="early", hosts={"cpus_per_host": cores // 2}, output=str(tmp_path))
    hosts = SweepHosts(spec, build_idle, said.append, run.folder)

    def are_ready(count: int) -> bool:
        hosts.look()
        return len(hosts._ready) == count

    try:
        hosts.require_same_nodes()
        hosts.load()
        wait_until(lambda: are_ready(2))
        hosts._run = OutOfReach(run.path)
        started.ray.kill(hosts.actors[0])
        wait_until(lambda: are_ready(1) and f"host-2 was lost: {far}" in said)
        hosts._run = run.folder
        wait_until(lambda: are_ready(2))
        assert hosts._losses._counted.total() == 1  # the one that was killed
    finally:
        hosts.end()


def test_new_checkpoint_is_not_let_go_for_damaged_ones_of_later_steps(tmp_path: Path) -> None:
    shelf = Shelf(Folder(tmp_path), 0)
    for step in (30, 40):
        shelf.put(seal({"weights.bin": b"good"}, {"step": step}), {}, [{"step": step}])
        (tmp_path / "tune" / "trial-0000" / f"checkpoint_{step:06d}" / "weights.bin").write_bytes(b"gone")
    saved = shelf.newest()  # as every seat asks first
    assert saved is not None
    assert (saved.checkpoint, len(saved.damaged)) == (None, 2)
    for step in (10, 20):
        shelf.put(seal({"weights.bin": b"anew"}, {"step": step}), {}, [{"step": step}])
        saved = shelf.newest()
        assert saved is not None
        assert saved.checkpoint is not None
        assert (step_of(saved.checkpoint), saved.damaged) == (step, ())


def test_seat_that_is_cut_off_takes_nothing_from_the_one_that_has_gone_on_elsewhere(tmp_path: Path) -> None:
    """Both had found the checkpoint of step 30 damaged, and begun from 20."""

    def put(shelf: Shelf, step: int) -> None:
        reports = [{"step": before} for before in range(10, step + 1, 10)]
        shelf.put(seal({"weights.bin": b"good"}, {"step": step}), {"rank": 4}, reports)

    before, cut_off, other = (Shelf(Folder(tmp_path), 0) for _ in range(3))
    for step in (10, 20, 30):
        put(before, step)
    (tmp_path / "tune" / "trial-0000" / "checkpoint_000030" / "weights.bin").write_bytes(b"gone")
    for shelf in (cut_off, other):
        shelf.newest()
    for step in (30, 40, 50):
        put(other, step)
    for step in (30, 40):
        put(cut_off, step)
        saved = Shelf(Folder(tmp_path), 0).newest()
        assert saved is not None
        assert saved.checkpoint is not None
        assert (step_of(saved.checkpoint), saved.damaged, len(saved.reports)) == (50, (), 5)
    put(other, 60)
    names = sorted(path.name for path in (tmp_path / "tune" / "trial-0000").iterdir())
    assert names == ["checkpoint_000050", "checkpoint_000060"]


def test_checkpoint_that_is_known_to_be_damaged_keeps_no_whole_one_from_staying(tmp_path: Path) -> None:
    """It was the newest but one when the next was written: with that one damaged too, the trial goes on from 10."""
    shelf = Shelf(Folder(tmp_path), 0)
    folder = tmp_path / "tune" / "trial-0000"
    shelf.put(seal({"weights.bin": b"good"}, {"step": 10}), {"rank": 4}, [{"step": 10}])
    shelf.put_unreported(seal({"weights.bin": b"good"}, {"step": 15}), {"rank": 4})
    (folder / "checkpoint_000015" / "weights.bin").write_bytes(b"gone")
    assert shelf.newest() is not None
    shelf.put(seal({"weights.bin": b"good"}, {"step": 20}), {"rank": 4}, [{"step": 10}, {"step": 20}])
    (folder / "checkpoint_000020" / "weights.bin").write_bytes(b"gone")
    saved = shelf.newest()
    assert saved is not None
    assert saved.checkpoint is not None
    assert step_of(saved.checkpoint) == 10
    for step in (15, 20):  # made again, they are whole, and stay
        shelf.put(seal({"weights.bin": b"good"}, {"step": step}), {"rank": 4}, [{"step": 10}])
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint_000015", "checkpoint_000020"]


def test_checkpoint_between_two_reports_tells_none_that_is_yet_to_come_and_is_kept(tmp_path: Path) -> None:
    """Of the two after it one is damaged, and one was never written to its end: the trial went on from 20."""
    shelf = Shelf(Folder(tmp_path), 0)
    reports = [{"step": step} for step in (10, 20, 30, 40)]
    for count in (1, 2, 3, 4):
        shelf.put(seal({"weights.bin": b"good"}, {"step": 10 * count}), {"rank": 4}, reports[:count])
    folder = tmp_path / "tune" / "trial-0000"
    (folder / "checkpoint_000030" / "weights.bin").write_bytes(b"gone")
    (folder / "checkpoint_000040" / TRIAL).unlink()
    for step in (25, 27):
        shelf.put_unreported(seal({"weights.bin": b"anew"}, {"step": step}), {"rank": 4})
        saved = shelf.newest()
        assert saved is not None
        assert saved.checkpoint is not None
        assert (step_of(saved.checkpoint), len(saved.damaged)) == (step, 2)
        assert (saved.parameters, saved.reports) == ({"rank": 4}, reports[:2])
    assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint_0000{step}" for step in (25, 27, 30, 40)]


@pytest.mark.parametrize(("name", "told"), [("weights.bin", 2), (TRIAL, 2), (REPORTS, 1)])
def test_trial_that_is_saved_where_its_checkpoint_is_damaged_is_kept_as_it_stands(
    tmp_path: Path, name: str, told: int
) -> None:
    shelf = Shelf(Folder(tmp_path), 0)
    reports = [{"step": step} for step in (10, 20)]
    for count in (1, 2):
        shelf.put(seal({"weights.bin": b"good"}, {"step": 10 * count}), {"rank": 4}, reports[:count])
    (tmp_path / "tune" / "trial-0000" / "checkpoint_000020" / name).write_bytes(b"gone")
    shelf.put_unreported(seal({"weights.bin": b"anew"}, {"step": 20}), {"rank": 4})
    saved = shelf.newest()
    assert saved is not None
    assert saved.checkpoint is not None
    assert (step_of(saved.checkpoint), saved.checkpoint["weights.bin"], saved.damaged) == (20, b"anew", ())
    assert (saved.parameters, saved.reports) == ({"rank": 4}, reports[:told])


@pytest.mark.parametrize(
    ("name", "was", "now"),
    [(TRIAL, b'"step": 4', b'"step": 5'), (TRIAL, b'"tokens": 12', b'"tokens": 13'), (REPORTS, b"0.25", b"0.75")],
)
def test_what_a_checkpoint_tells_is_sealed_as_its_weights_are(
    tmp_path: Path, name: str, was: bytes, now: bytes
) -> None:
    shelf = Shelf(Folder(tmp_path), 0)
    for step in (2, 4):
        reports = [{"step": step, "eval_loss": 0.25}]
        shelf.put(seal({"weights.bin": b""}, {"step": step, "tokens": 12}), {"rank": 4}, reports)
    file = tmp_path / "tune" / "trial-0000" / "checkpoint_000004" / name
    assert was in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(was, now))
    saved = shelf.newest()
    assert saved is not None
    assert saved.checkpoint is not None
    assert step_of(saved.checkpoint) == 2
    (damaged,) = saved.damaged
    assert f"{name} is damaged" in damaged


class ResumingEngine(IdleEngine):
    """Goes on from a checkpoint."""

    def admit(self, trial: str, config: TrialConfig, checkpoint: Checkpoint | None = None) -> None:
        super().admit(trial, config)
        self.steps[trial] = step_of(checkpoint) if checkpoint else 0


def build_resuming(data: Any) -> ResumingEngine:
    return ResumingEngine()


def other_weights() -> None:
    raise NodeUnfit("it has other weights")


def build_counting(data: Any) -> IdleEngine:
    return IdleEngine()


@pytest.mark.parametrize("alone", [0, 20], ids=["from the start", "hosts join later"])
def test_seats_are_started_once_each_though_trials_end_while_others_start(
    started: Hosts, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: int
) -> None:
    """A trial takes a hundredth of what a seat's process takes to start.

    Args:
        alone: trials that end while there is room for one.
    """
    from ray._private.state import actors

    from lora_search.sweep.hosts import Hosts as SweepHosts
    from lora_search.sweep.trials import search

    def seats() -> int:
        return sum(actor["ActorClassName"] == "Seat" for actor in actors().values())

    class Ends(Observer):
        def trial_ended(self, trial: int, state: str, reason: str | None) -> None:
            ended.append(trial)

    ended: list[int] = []
    capacity, before = 3, seats()
    spec = make_spec(
        tiny,
        name="seats",
        hosts={"count": 1, "trials_per_host": capacity},
        search={"trials": 60, "sampler": {"name": "random"}, "scheduler": {"name": "none"}},
        output=str(tmp_path),
    )
    hosts = SweepHosts(spec, build_idle)
    try:
        hosts.load()
        monkeypatch.setattr(SweepHosts, "capacity", property(lambda self: capacity if len(ended) >= alone else 1))
        rows = search(spec, fresh_run(tmp_path, spec.name), hosts, [Ends()])
    finally:
        hosts.end()
    assert [row["state"] for row in rows] == ["completed"] * 60
    assert seats() - before == capacity
