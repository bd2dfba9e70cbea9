"""A host: trials join and leave between steps, and one trial's trouble stays its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE

from lora_search.checkpoint import Checkpoint, seal
from lora_search.errors import HostFailed, InputError, TrialFailed
from lora_search.host import Host
from lora_search.space import TrialConfig
from lora_search.spec.schema import Lora, Training
from lora_search.storage import Folder

CONFIG = TrialConfig(Lora(), Training())


@dataclass
class CountedReport:
    step: int

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step}


class CountingEngine:
    """An engine that counts steps and keeps the order of everything it is asked to do."""

    pack_limit: int | None = None

    def __init__(self, failing: Mapping[str, int] | None = None, broken_step: bool = False) -> None:
        self.steps: dict[str, int] = {}
        self.ranks: dict[str, int] = {}
        self.log: list[tuple[str, ...]] = []
        self._failing = failing or {}
        self._broken = broken_step

    def admit(self, trial: str, config: TrialConfig, checkpoint: Checkpoint | None = None) -> None:
        if trial in self.steps:
            raise ValueError(f"trial {trial} is resident already")
        if config.lora.rank == 1:
            raise InputError("rank 1 is not to be had here")
        self.ranks[trial] = config.lora.rank
        self.steps[trial] = 0 if checkpoint is None else int(checkpoint["step"])

    def ever(self) -> int | None:
        return None

    def room(self, *more: TrialConfig) -> int:
        """Each trial takes its rank, and there are 100 of them."""
        return 100 - sum(self.ranks.values()) - sum(config.lora.rank for config in more)

    def size(self, config: TrialConfig) -> int:
        return config.lora.rank

    def fits(self, config: TrialConfig) -> bool:
        return config.lora.rank <= 100

    def release(self, trial: str) -> None:
        del self.ranks[trial]
        del self.steps[trial]

    def position(self, trial: str) -> int:
        return self.steps[trial]

    def snapshot(self, trial: str) -> Checkpoint:
        return {"step": str(self.steps[trial]).encode()}

    def step(self, trials: Sequence[str]) -> dict[str, Any]:
        if self._broken:
            raise RuntimeError("the device has fallen off the bus")
        self.log.append(tuple(trials))
        outcomes: dict[str, Any] = {}
        for trial in trials:
            if self._failing.get(trial) == self.steps[trial]:
                outcomes[trial] = TrialFailed("loss is nan")
            else:
                self.steps[trial] += 1
        return outcomes

    def report(self, trials: Sequence[str]) -> dict[str, CountedReport]:
        return {trial: CountedReport(self.steps[trial]) for trial in trials}


async def make_host(engine: CountingEngine, capacity: int = 4) -> Host:
    host = Host("host-0", capacity, lambda data: engine)
    await host.load(None)
    return host


class Held(CountingEngine):
    """Is in the middle of a step until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Event(), threading.Event()

    def step(self, trials: Sequence[str]) -> dict[str, Any]:
        self.entered.set()
        self.go.wait()
        return super().step(trials)

    def snapshot(self, trial: str) -> Checkpoint:
        return seal({"weights.bin": b""}, {"step": self.steps[trial]})


def test_residents_are_trained_in_the_same_steps() -> None:
    engine = Held()

    async def story() -> list[dict[str, Any]]:
        host = await make_host(engine)
        for trial in "abc":
            assert await host.admit(trial, CONFIG)
        training = [asyncio.ensure_future(host.advance(trial, 2000)) for trial in "abc"]
        await asyncio.to_thread(engine.entered.wait)  # the first step may have begun before all had asked
        engine.go.set()
        return await asyncio.gather(*training)

    assert [report["step"] for report in asyncio.run(story())] == [2000] * 3
    assert sum(len(trials) == 3 for trials in engine.log) >= 1999


class Endless(CountingEngine):
    """Leaves the trial "long" out before its last step until it is let go, and trains the others."""

    held = True

    def step(self, trials: Sequence[str]) -> dict[str, Any]:
        going = [trial for trial in trials if not (self.held and trial == "long" and self.steps[trial] == 49_999)]
        return super().step(going) if going else {}


def test_trial_joins_while_others_train() -> None:
    engine = Endless()

    async def story() -> tuple[dict[str, Any], dict[str, Any]]:
        host = await make_host(engine)
        await host.admit("long", CONFIG)
        long = asyncio.ensure_future(host.advance("long", 50_000))
        await asyncio.sleep(0.01)
        try:
            async with asyncio.timeout(60):
                await host.admit("late", CONFIG)
                late = await host.advance("late", 5)
            assert not long.done()
        finally:
            engine.held = False
        return await long, late

    long, late = asyncio.run(story())
    assert (long["step"], late["step"], late["host"]) == (50_000, 5, "host-0")


def test_call_that_is_cancelled_ends_no_training() -> None:
    engine = Held()

    async def story() -> list[Any]:
        host = await make_host(engine)
        for trial in "ab":
            assert await host.admit(trial, CONFIG)
        training = asyncio.ensure_future(host.advance("a", 1))
        await asyncio.to_thread(engine.entered.wait)
        asked = asyncio.ensure_future(host.snapshot("a"))
        await asyncio.sleep(0.05)  # it waits for the step's end
        asked.cancel()
        engine.go.set()
        return [(await training)["step"], (await asyncio.wait_for(host.advance("b", 1), PATIENCE))["step"]]

    assert asyncio.run(story()) == [1, 1]


def test_trial_that_the_engine_cannot_let_go_is_resident_no_more() -> None:
    class Clinging(CountingEngine):
        def release(self, trial: str) -> None:
            super().release(trial)
            raise RuntimeError("CUDA error: out of order")

    async def story() -> tuple[str, int]:
        host = await make_host(Clinging())
        for trial in "ab":
            assert await host.admit(trial, CONFIG)
            await host.advance(trial, 1)
        with pytest.raises(RuntimeError, match="out of order"):
            await host.release("a")
        assert (await host.advance("b", 2))["step"] == 2
        return await host.describe(), (await host.room())[0]

    assert asyncio.run(story()) == ("host-0 trains trials b of at most 4, 0 of them in the pass", 3)


def test_trial_that_leaves_while_all_are_saved_costs_no_other_its_checkpoint(tmp_path: Path) -> None:
    engine = Held()

    async def story() -> list[tuple[int, int, str]]:
        host = await make_host(engine)
        for trial in "12":
            assert await host.admit(trial, CONFIG)
        training = asyncio.ensure_future(host.advance("2", 10**6))
        await asyncio.to_thread(engine.entered.wait)
        leaving = [asyncio.ensure_future(host.release("1")) for _ in range(2)]  # by its seat's end, and by its own
        saving = asyncio.ensure_future(host.save_all(Folder(tmp_path)))
        await asyncio.sleep(0.05)  # all of them wait for the step's end
        engine.go.set()
        await asyncio.gather(*leaving)
        assert not training.done()
        return await saving

    assert asyncio.run(story()) == [(2, 1, "tune/trial-0002/checkpoint_000001")]


@pytest.mark.parametrize("alone", [False, True])
def test_seat_that_is_lost_while_its_trial_is_let_in_leaves_nothing_behind(alone: bool) -> None:
    """Its call stays where it is, and is gone on with behind a step, or an evaluation."""
    engine = Held()

    async def story() -> list[Any]:
        host = await make_host(engine, capacity=3)
        assert await host.admit("a", CONFIG)
        training = asyncio.ensure_future(host.advance("a", 2))
        await asyncio.to_thread(engine.entered.wait)
        lost = [asyncio.ensure_future(host.admit(trial, CONFIG, alone=alone)) for trial in "bc"]
        await asyncio.sleep(0.05)
        leaving = [asyncio.ensure_future(host.release(trial, 0)) for trial in "bc"]
        after = asyncio.ensure_future(host.admit("b", CONFIG, attempt=1))
        await asyncio.sleep(0.05)
        engine.go.set()
        said = [*(await asyncio.gather(*lost)), await after]
        await asyncio.gather(training, *leaving)
        return [*said, await host.release("b", 0), await host.describe(), (await host.room())[0]]

    said = asyncio.run(story())
    assert said == [False, False, True, None, "host-0 trains trials a, b of at most 3, 0 of them in the pass", 1]


def test_next_seat_of_a_trial_comes_though_the_last_ones_call_is_on_its_way() -> None:
    engine = Held()

    async def story() -> list[bool | None]:
        host = await make_host(engine, capacity=3)
        assert await host.admit("a", CONFIG)
        training = asyncio.ensure_future(host.advance("a", 2))
        await asyncio.to_thread(engine.entered.wait)
        tries = [asyncio.ensure_future(host.admit("b", CONFIG, attempt=attempt)) for attempt in (0, 1, 1)]
        await asyncio.sleep(0.05)
        engine.go.set()
        await training
        return [*(await asyncio.gather(*tries)), await host.admit("b", CONFIG, attempt=0)]

    assert asyncio.run(story()) == [False, True, True, False]


def test_full_host_admits_nobody_until_one_leaves() -> None:
    async def story() -> list[Any]:
        host = await make_host(CountingEngine(), capacity=2)
        said: list[Any] = [await host.admit(trial, CONFIG) for trial in "abc"]
        said.append((await host.room())[0])
        await host.release("a")
        said += [(await host.room())[0], await host.admit("c", CONFIG)]
        await host.release("nobody")
        return said

    assert asyncio.run(story()) == [True, True, False, 0, 1, True]


class Full(CountingEngine):
    """Has no memory for a second trial, or for one of rank 99, whatever was reckoned."""

    def admit(self, trial: str, config: TrialConfig, checkpoint: Checkpoint | None = None) -> None:
        if self.steps or config.lora.rank == 99:
            raise TrialFailed("out of memory")
        super().admit(trial, config, checkpoint)


def test_trial_that_finds_no_memory_as_it_is_let_in_waits_unless_it_was_alone() -> None:
    async def story() -> list[Any]:
        host = await make_host(Full())
        said: list[Any] = [await host.admit(trial, CONFIG) for trial in "abc"]
        await host.advance("a", 1)
        for trial in "bc":
            with pytest.raises(HostFailed, match="out of memory, with 2 trials resident"):
                await host.advance(trial, 1)
        said += [await host.admit("b", CONFIG)]
        await host.release("a")
        said += [await host.admit("b", CONFIG), (await host.advance("b", 1))["step"]]
        await host.release("b")
        said += [await host.admit("c", ranked(99))]
        with pytest.raises(TrialFailed, match="out of memory"):
            await host.advance("c", 1)
        return [*said, (await host.room())[0]]

    # No other is taken beside one any more, only to fail.
    assert asyncio.run(story()) == [True, True, True, False, True, 1, True, 1]


def test_trial_that_is_refused_for_itself_costs_no_other_its_place() -> None:
    async def story() -> list[Any]:
        host = await make_host(CountingEngine(), capacity=3)
        said: list[Any] = [await host.admit("a", CONFIG), await host.admit("b", ranked(1))]
        with pytest.raises(TrialFailed, match="rank 1"):
            await host.advance("b", 1)
        said += [(await host.room())[0], (await host.advance("a", 1))["step"]]
        await host.release("b")  # as its end is heard of
        return said

    assert asyncio.run(story()) == [True, True, 2, 1]


def ranked(rank: int) -> TrialConfig:
    return TrialConfig(Lora(rank=rank), Training())


def test_trials_are_admitted_by_the_bytes_they_take() -> None:
    async def story() -> list[Any]:
        host = await make_host(CountingEngine(), capacity=8)
        said: list[Any] = [await host.admit("a", ranked(60)), await host.admit("b", ranked(60))]
        said += [await host.admit("c", ranked(40)), await host.room()]
        await host.release("a")
        return [*said, await host.room(), await host.admit("b", ranked(60))]

    assert asyncio.run(story()) == [True, False, True, (6, 0), (7, 60), True]


def test_largest_goes_first_though_all_came_to_a_full_host() -> None:
    async def story() -> list[bool | None]:
        host = await make_host(CountingEngine(), capacity=1)
        await host.admit("first", ranked(10))
        waiting = [("small", ranked(5)), ("large", ranked(50))]
        said = [await host.admit(*one) for one in waiting]
        await host.release("first")
        return said + [await host.admit(*one) for one in waiting]

    assert asyncio.run(story()) == [False, False, False, True]


class Leaving(CountingEngine):
    """Is in the middle of letting a trial go until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves, self.let_go = threading.Event(), threading.Event()

    def release(self, trial: str) -> None:
        self.leaves.set()
        self.let_go.wait(PATIENCE)
        super().release(trial)


def test_trial_that_was_judged_while_another_left_is_let_in() -> None:
    """The host is full when the trial is judged, and has a place when the trial is told that it does not fit."""
    engine = Leaving()

    async def story() -> list[bool | None]:
        host = await make_host(engine, capacity=1)
        await host.admit("first", ranked(10))
        await host.advance("first", 1)
        leaving = asyncio.ensure_future(host.release("first"))
        await asyncio.sleep(0.05)
        second = asyncio.ensure_future(host.admit("second", ranked(5)))
        await asyncio.sleep(0.05)
        engine.let_go.set()
        await leaving
        return [await second, await host.admit("second", ranked(5))]

    assert asyncio.run(story()) == [False, True]


def test_trial_that_ends_while_it_waits_holds_nobody_up() -> None:
    async def story() -> bool | None:
        host = await make_host(CountingEngine(), capacity=1)
        await host.admit("first", ranked(10))
        assert not await host.admit("large", ranked(50))
        await host.release("large")  # stopped, or failed, before it was ever admitted
        await host.release("first")
        return await host.admit("small", ranked(5))

    assert asyncio.run(story())


def test_trial_larger_than_the_estimate_allows_is_tried_alone_where_no_host_has_more_memory() -> None:
    async def story() -> list[bool | None]:
        host = await make_host(CountingEngine(), capacity=8)
        said = [await host.admit("a", ranked(200)), await host.admit("small", ranked(2))]
        said += [await host.admit("a", ranked(200)), await host.admit("a", ranked(200), anyway=True)]
        await host.release("small")
        return [*said, await host.admit("a", ranked(200)), await host.admit("b", ranked(2))]

    assert asyncio.run(story()) == [None, True, None, False, True, False]


def test_one_trials_failure_reaches_its_seat_alone() -> None:
    engine = CountingEngine(failing={"bad": 3})

    async def story() -> list[Any]:
        host = await make_host(engine)
        await host.admit("bad", CONFIG)
        await host.admit("good", CONFIG)
        return await asyncio.gather(host.advance("bad", 10), host.advance("good", 10), return_exceptions=True)

    bad, good = asyncio.run(story())
    assert isinstance(bad, TrialFailed)
    assert good["step"] == 10


class Crowded(CountingEngine):
    """Finds out at a trial's second step, or report, that its memory is for one trial less."""

    def __init__(self, asked: str) -> None:
        super().__init__()
        self._asked = asked

    def step(self, trials: Sequence[str]) -> dict[str, Any]:
        outcomes = super().step(trials)
        return outcomes | self._short(trials) if self._asked == "step" else outcomes

    def report(self, trials: Sequence[str]) -> dict[str, Any]:
        reports: dict[str, Any] = dict(super().report(trials))
        return reports | self._short(trials) if self._asked == "report" else reports

    def _short(self, trials: Sequence[str]) -> dict[str, Any]:
        if "large" not in trials or self.steps["large"] < 2:
            return {}
        self.pack_limit = len(self.steps) - 1
        return {"large": HostFailed("out of memory at step 2, with 3 trials resident")}


@pytest.mark.parametrize("asked", ["step", "report"])
def test_trial_that_finds_no_memory_beside_others_leaves_them_its_own_and_goes_on_elsewhere(asked: str) -> None:
    engine = Crowded(asked)

    async def story() -> None:
        host = await make_host(engine)
        alive = asyncio.ensure_future(host.live())
        for trial in ("large", "a", "b"):
            await host.admit(trial, CONFIG)
        until = {"large": 2, "a": 10, "b": 10}
        large, *others = await asyncio.gather(
            *(host.advance(trial, step) for trial, step in until.items()), return_exceptions=True
        )
        assert isinstance(large, HostFailed)
        assert [report["step"] for report in others] == [10, 10]
        assert sorted(engine.steps) == ["a", "b"]
        assert await host.holds_fewer(4) == 2
        assert not await host.admit("large", CONFIG, {"step": b"1"})
        await host.release("a")
        assert await host.admit("large", CONFIG, {"step": b"0"})
        assert (await host.advance("b", 11))["step"] == 11
        assert not alive.done()
        alive.cancel()

    asyncio.run(story())


@pytest.mark.parametrize("asked", ["step", "report"])
def test_trial_on_its_last_try_that_is_sent_away_leaves_its_place_to_others(asked: str) -> None:
    async def story() -> list[bool | None]:
        host = await make_host(Crowded(asked))
        await host.admit("proven", CONFIG)
        await host.advance("proven", 1)
        await host.advance("proven", 2)
        assert await host.admit("large", CONFIG, alone=True)
        gone = await asyncio.gather(host.advance("large", 3), return_exceptions=True)
        assert isinstance(gone[0], HostFailed)
        await host.release("large")
        await host.release("proven")
        return [await host.admit("next", CONFIG), await host.admit("last", CONFIG, alone=True)]

    assert asyncio.run(story()) == [True, False]  # the host holds one now


def test_refused_trial_takes_no_room() -> None:
    async def story() -> int:
        host = await make_host(CountingEngine(), capacity=1)
        assert await host.admit("a", ranked(1))
        with pytest.raises(TrialFailed, match="rank 1"):  # which no other host would take either
            await host.advance("a", 1)
        return (await host.room())[0]

    assert asyncio.run(story()) == 1


def test_host_whose_step_breaks_takes_no_more_trials_and_says_why() -> None:
    """Its trials did nothing wrong: whatever the engine raises, rather than returns, is the host's own fault."""
    engine = CountingEngine()

    async def story() -> None:
        host = await make_host(engine)
        alive = asyncio.ensure_future(host.live())
        await host.admit("a", CONFIG)
        await host.admit("b", CONFIG)
        await host.advance("a", 1)
        engine._broken = True
        told = await asyncio.gather(host.advance("a", 2), host.advance("b", 2), return_exceptions=True)
        assert [str(error) for error in told] == ["RuntimeError: the device has fallen off the bus"] * 2
        assert all(isinstance(error, HostFailed) for error in told)
        with pytest.raises(HostFailed, match="fallen off the bus"):
            await alive
        assert (await host.room())[0] <= 0
        assert not await host.admit("c", CONFIG)
        await host.release("a")

    asyncio.run(story())


@pytest.mark.parametrize("asked", ["admit", "snapshot"])
def test_host_whose_device_fails_between_two_steps_takes_no_more_trials(asked: str) -> None:
    engine = CountingEngine()

    def fail(*given: Any) -> Any:
        raise HostFailed("AcceleratorError: CUDA error: an illegal memory access was encountered")

    async def story() -> None:
        host = await make_host(engine)
        alive = asyncio.ensure_future(host.live())
        await host.admit("a", CONFIG)
        await host.admit("b", CONFIG)
        setattr(engine, asked, fail)
        with pytest.raises(HostFailed, match="illegal memory access"):
            await (host.advance("b", 1) if asked == "admit" else host.snapshot("a"))
        with pytest.raises(HostFailed, match="illegal memory access"):
            await alive
        assert (await host.room())[0] <= 0

    asyncio.run(story())


def test_trial_that_is_not_on_a_host_is_not_waited_for_there() -> None:
    async def story() -> None:
        host = await make_host(CountingEngine())
        await host.admit("a", CONFIG)
        await host.release("a")
        with pytest.raises(HostFailed, match="trial a is not on"):
            await host.advance("a", 1)
        await host.admit("b", CONFIG)
        assert (await host.advance("b", 1))["step"] == 1

    asyncio.run(story())


@pytest.mark.parametrize("attempt", [0, None])
def test_goal_of_a_trial_that_is_just_leaving_costs_no_other_its_host(attempt: int | None) -> None:
    """Its seat had asked before it was lost; the trial has gone when the host comes to it."""
    engine = Leaving()

    async def story() -> list[Any]:
        host = await make_host(engine)
        for trial in "ab":
            assert await host.admit(trial, CONFIG)
            await host.advance(trial, 1)
        leaving = asyncio.ensure_future(host.release("a", attempt))
        await asyncio.to_thread(engine.leaves.wait)
        late = [asyncio.ensure_future(host.advance(trial, 3)) for trial in "ab"]
        await asyncio.sleep(0.05)
        engine.let_go.set()
        await leaving
        gone, there = await asyncio.gather(*late, return_exceptions=True)
        return [str(gone), there["step"]]

    assert asyncio.run(story()) == ["trial a is not on host-0", 3]


def test_host_says_for_how_long_it_has_been_at_a_step() -> None:
    engine = Held()

    async def waits(host: Host) -> None:
        """For something to do, as soon as it has answered whoever asked last."""
        async with asyncio.timeout(PATIENCE):
            while await host.busy_s():
                await asyncio.sleep(0.01)

    async def story() -> float:
        host = await make_host(engine)
        await waits(host)
        assert await host.admit("a", CONFIG)
        training = asyncio.ensure_future(host.advance("a", 1))
        await asyncio.to_thread(engine.entered.wait)
        await asyncio.sleep(0.1)
        within = await host.busy_s()
        engine.go.set()
        await training
        await waits(host)
        return within

    assert 0.1 <= asyncio.run(story()) < PATIENCE


def test_goal_of_a_seat_that_was_lost_costs_nothing_though_the_trial_has_come_again() -> None:
    """The host is busy for so long that it comes to the goal when the trial's next seat has its place already."""
    engine = Leaving()

    async def story() -> list[Any]:
        host = await make_host(engine)
        assert await host.admit("a", CONFIG)
        await host.advance("a", 1)
        leaving = asyncio.ensure_future(host.release("a", 0))
        await asyncio.to_thread(engine.leaves.wait)
        late = asyncio.ensure_future(host.advance("a", 3))
        await asyncio.sleep(0.05)
        busy = [asyncio.ensure_future(host.run(time.sleep, 0.3))]
        await asyncio.sleep(0.05)
        engine.let_go.set()
        await asyncio.sleep(0.15)
        again = asyncio.ensure_future(host.admit("a", CONFIG, attempt=1))
        await asyncio.sleep(0.05)
        busy.append(asyncio.ensure_future(host.run(time.sleep, 0.3)))
        admitted = await again
        gone = await asyncio.gather(late, return_exceptions=True)
        await asyncio.gather(leaving, *busy)
        return [admitted, str(gone[0]), (await host.advance("a", 2))["step"]]

    assert asyncio.run(story()) == [True, "trial a is not on host-0", 2]


def test_host_that_breaks_off_while_a_trial_asks_does_not_take_it() -> None:
    """It would be held against the trial, and there is nothing that it did."""
    engine = Held()

    async def story() -> list[Any]:
        host = await make_host(engine)
        assert await host.admit("a", CONFIG)
        training = asyncio.ensure_future(host.advance("a", 2))
        await asyncio.to_thread(engine.entered.wait)
        asking = asyncio.ensure_future(host.admit("b", CONFIG))
        await asyncio.sleep(0.05)
        engine._broken = True
        engine.go.set()
        failed = await asyncio.gather(training, return_exceptions=True)
        with pytest.raises(HostFailed):
            await host.live()
        return [str(failed[0]), await asking]

    assert asyncio.run(story()) == ["RuntimeError: the device has fallen off the bus", False]


def test_device_that_fails_as_all_are_saved_costs_none_that_is_saved_already(tmp_path: Path) -> None:
    class Failing(Held):
        def snapshot(self, trial: str) -> Checkpoint:
            if trial == "2":
                raise HostFailed("CUDA error: an illegal memory access was encountered")
            return super().snapshot(trial)

    async def story() -> list[tuple[int, int, str]]:
        engine = Failing()
        engine.go.set()
        host = await make_host(engine)
        for trial in "123":
            assert await host.admit(trial, CONFIG)
            await host.advance(trial, 1)
        return await host.save_all(Folder(tmp_path))

    assert asyncio.run(story()) == [(1, 1, "tune/trial-0001/checkpoint_000001")]


def test_seat_that_is_lost_before_its_trial_is_let_in_leaves_its_place_and_its_bytes() -> None:
    async def story() -> list[Any]:
        engine = CountingEngine()
        host = await make_host(engine, capacity=2)
        said: list[Any] = [await host.admit("a", ranked(60)), await host.admit("b", ranked(60)), await host.room()]
        await host.release("a", 0)
        said += [await host.room(), await host.admit("b", ranked(60)), sorted(engine.steps)]
        with pytest.raises(HostFailed, match="trial a is not on host-0"):
            await host.advance("a", 1)
        return [*said, (await host.advance("b", 1))["step"]]

    assert asyncio.run(story()) == [True, False, (1, 40), (2, 100), True, [], 1]


def test_trial_whose_seat_was_lost_starts_over_from_its_checkpoint() -> None:
    async def story() -> tuple[int, Checkpoint]:
        engine = CountingEngine()
        host = await make_host(engine, capacity=1)
        await host.admit("a", CONFIG)
        await host.advance("a", 4)
        checkpoint = await host.snapshot("a")
        await host.advance("a", 6)
        assert await host.admit("a", CONFIG, checkpoint)
        engine.log.clear()
        await host.advance("a", 7)
        return len(engine.log), checkpoint

    assert asyncio.run(story()) == (3, {"step": b"4"})


def test_whoever_asks_hears_of_it_when_a_host_holds_fewer_trials_than_it_did() -> None:
    async def story() -> None:
        engine = CountingEngine()
        host = await make_host(engine, capacity=4)
        fewer = [asyncio.ensure_future(host.holds_fewer(4)) for _ in range(2)]
        assert await host.holds_fewer(5) == 4
        await host.admit("a", CONFIG)
        await host.advance("a", 1)
        assert not any(answer.done() for answer in fewer)
        engine.pack_limit = 3
        await host.advance("a", 2)
        assert await asyncio.wait_for(asyncio.gather(*fewer), PATIENCE) == [3, 3]
        engine.pack_limit = 2
        await host.advance("a", 3)
        assert await host.holds_fewer(3) == 2

    asyncio.run(story())


def test_trial_on_its_last_try_has_none_beside_it_that_has_not_reported() -> None:
    async def story() -> None:
        host = await make_host(CountingEngine(), capacity=4)
        assert await host.admit("proven", CONFIG)
        assert await host.admit("new", CONFIG)
        await host.advance("proven", 1)
        await host.advance("proven", 2)
        assert not await host.admit("last", CONFIG, alone=True)
        await host.advance("new", 1)
        assert not await host.admit("last", CONFIG, alone=True)  # its seat may not have heard of that yet
        await host.advance("new", 2)
        assert await host.admit("last", CONFIG, alone=True)
        assert (await host.room())[0] <= 0
        assert not await host.admit("next", CONFIG)
        await host.advance("last", 1)
        await host.snapshot("last")
        assert not await host.admit("next", CONFIG)
        await host.advance("last", 2)
        assert await host.admit("next", CONFIG)
        assert not await host.admit("other", CONFIG, alone=True)
        await host.release("next")  # as where it fails
        assert await host.admit("other", CONFIG, alone=True)
        await host.release("other")
        assert (await host.room())[0] == 1

    asyncio.run(story())


def test_trial_that_is_shunned_is_not_let_in_and_holds_up_no_other() -> None:
    async def story() -> None:
        host = await make_host(CountingEngine(), capacity=1)
        await host.admit("there", CONFIG)
        assert not await host.admit("shunned", CONFIG)
        await host.shun("shunned")
        await host.release("there")
        assert not await host.admit("shunned", CONFIG)
        assert await host.admit("other", CONFIG)
        await host.release("other")
        await host.welcome("shunned")
        assert await host.admit("shunned", CONFIG)

    asyncio.run(story())


def test_host_does_other_work_with_and_without_its_engine() -> None:
    async def story() -> tuple[int, int]:
        host = await make_host(CountingEngine())
        await host.admit("a", CONFIG)
        await host.advance("a", 3)
        position = await host.run_with_engine(lambda engine: engine.position("a"))
        await host.unload()
        with pytest.raises(AttributeError):
            await host.run_with_engine(lambda engine: engine.position("a"))
        return position, await host.run(max, 4, 5)

    assert asyncio.run(story()) == (3, 5)


def test_base_that_cannot_be_loaded_is_said_to_who_waits() -> None:
    def build(data: str) -> CountingEngine:
        raise InputError("no such model")

    async def story() -> None:
        await Host("host-0", 1, build).load("some data")

    with pytest.raises(InputError, match="no such model"):
        asyncio.run(story())
