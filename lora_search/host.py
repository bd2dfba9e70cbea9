"""A host: the actor that owns one device, holds the base once and trains its resident trials.

The class knows nothing of Ray; the sweep makes an actor of it. Ray runs the methods on an event loop, and all of the
training on one thread: between two steps that thread does what seats have asked for (admit, snapshot, release), so
that trials join and leave a running host.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from lora_search.checkpoint import Checkpoint, Shelf, step_of
from lora_search.errors import OUT_OF_MEMORY, HostFailed, InputError, TrialFailed
from lora_search.machine import give_back_heaps, share_heaps
from lora_search.space import TrialConfig
from lora_search.storage import Folder, StoreError
from lora_search.thread import Goal, TrainingThread
from lora_search.waiting import Attempts, Places, WaitingRoom

T = TypeVar("T")

logger = logging.getLogger(__name__)


class TrainsTrials(Protocol):
    """What a host needs of an engine."""

    pack_limit: int | None
    """Most trials that it can train together, once it has found that out the hard way."""

    def ever(self) -> int | None:
        """How many trials might fit at once, however small; None where nobody has reckoned."""
        ...

    def room(self, *more: TrialConfig) -> int:
        """Bytes that are left, with so many trials more as are given; negative where they do not fit."""
        ...

    def admit(self, trial: str, config: TrialConfig, checkpoint: Checkpoint | None = None) -> None: ...
    def size(self, config: TrialConfig) -> int:
        """Bytes that a trial takes by itself."""
        ...

    def fits(self, config: TrialConfig) -> bool:
        """Whether a trial would fit with no other beside it, as far as is known."""
        ...

    def release(self, trial: str) -> None: ...
    def position(self, trial: str) -> int: ...
    def snapshot(self, trial: str) -> Checkpoint: ...
    def step(self, trials: Sequence[str]) -> Mapping[str, Any]: ...
    def report(self, trials: Sequence[str]) -> Mapping[str, Any]: ...


class Host:
    """Trains what seats bring to it, all residents in turn (or together, as the engine does it)."""

    def __init__(self, name: str, capacity: int, build: Callable[[Any], TrainsTrials]) -> None:
        """
        Args:
            name: shown in results.
            capacity: trials resident at once.
            build: makes the engine of the data, on the training thread.
        """
        self.name = name
        self._places = Places(capacity)
        self._residents: dict[str, Mapping[str, Any] | None] = {}
        """By trial, its parameters as they were proposed, where they were told."""
        self._coming: dict[str, tuple[TrialConfig, Checkpoint | None]] = {}
        """Residents that the engine gets as soon as they are to be trained."""
        self._waiting = WaitingRoom()
        self._attempts = Attempts()
        self._door = asyncio.Lock()
        self._bytes_left = 0
        self._loaded = False
        self._end: Future[None] = Future()
        self._build = build
        share_heaps()
        self._engine: TrainsTrials
        self._thread = TrainingThread(self._train, self._break_off)

    async def load(self, data: Any, check: Callable[[], None] | None = None) -> dict[str, Any]:
        """Load the base, for trials on this data; what this host is.

        Args:
            check: called before any trial is let in; raises where none is to be.

        Raises:
            InputError: the base cannot be loaded.
        """

        def load() -> int:
            self._engine = self._build(data)
            if check is not None:
                check()
            self._places.hold_at_most(self._engine.ever())
            return self._engine.room()

        self._bytes_left = await self._thread.ask(load)
        self._loaded = True
        return {"name": self.name, "pid": os.getpid(), "capacity": self._places.most}

    async def unload(self) -> None:
        """Let the base and all of its trials go; what memory they held is free for other work."""

        def unload() -> None:
            del self._engine
            gc.collect()
            give_back_heaps()

        self._loaded = False
        await self._thread.ask(unload)
        self._residents.clear()
        self._coming.clear()

    async def run(self, work: Callable[..., T], *given: Any) -> T:
        """Do other work here, in a process that has all libraries loaded already."""
        return await self._thread.ask(lambda: work(*given))

    async def run_with_engine(self, work: Callable[[Any], T]) -> T:
        """Do other work with the engine."""
        return await self._thread.ask(lambda: work(self._engine))

    async def live(self) -> None:
        """Is never answered: whoever asks learns of the host's end.

        Raises:
            HostFailed: its device computes no longer.
        """
        await asyncio.wrap_future(self._end)

    async def holds_fewer(self, than: int) -> int:
        """Is answered by how many trials it holds, as soon as those are fewer: memory may tell it so at any time."""
        return await self._places.fewer(than)

    async def busy_s(self) -> float:
        """Seconds for which it has been at one step, or whatever else it does; 0 while there is nothing to do."""
        return self._thread.busy_s

    async def describe(self) -> str:
        """What it does at present, for people."""
        trials = ", ".join(sorted(self._residents, key=lambda trial: (len(trial), trial))) or "none"
        state = f"trains trials {trials} of at most {self._places.most}" if self._loaded else "has no base loaded"
        return f"{self.name} {state}, {self._thread.busy_with} of them in the pass"

    async def room(self) -> tuple[int, int]:
        """How many more trials may come, and the bytes that are left for them."""
        return self._left, self._bytes_left

    @property
    def _left(self) -> int:
        taken = len(self._residents)
        return self._places.left(taken) if self._loaded else -taken

    async def shun(self, trial: str) -> None:
        """Take a trial no more, that another host may be better for."""
        self._places.shun(trial)
        self._waiting.forget(trial)

    async def welcome(self, trial: str) -> None:
        """Take a trial again."""
        self._places.welcome(trial)

    async def admit(
        self,
        trial: str,
        config: TrialConfig,
        checkpoint: Checkpoint | None = None,
        parameters: Mapping[str, Any] | None = None,
        alone: bool = False,
        anyway: bool = False,
        attempt: int = 0,
        stays: bool = True,
    ) -> bool | None:
        """Make a trial resident, at its start or where a checkpoint left it; False where it has to wait, and ask again.

        None where another host is to have it, if there is one with more memory: here it would not fit even by itself.

        It takes its place, and reaches the engine when it is first to be trained: whoever has been answered knows that
        what becomes of the host then may be this trial's doing.

        A trial that is resident already (its seat was lost) starts over from the checkpoint.

        Args:
            parameters: as they were proposed; its checkpoint tells them, where it is kept here.
            alone: no other that has not reported may be beside it before it has.
            anyway: try it, with no other beside it, however large it seems.
            attempt: which of the trial's it is. Once a later one has come, or this one has been released, it is let in
                no more: its seat may be lost while it waits here.
            stays: whether it waits in line, where it has to wait: then others may be kept out for it until it asks.
        """
        if not self._loaded or self._places.shuns(trial):
            return False
        self._attempts.begin(trial, attempt)
        async with self._door:
            if self._attempts.over(trial, attempt):
                return False
            if trial in self._residents:
                await self._leave(trial)
            judged = self._waiting.state
            has_place = self._left > 0 and self._places.suits(alone=alone)
            left = await self._thread.ask(lambda: self._room(config)) if has_place else -1
            fits = has_place and (left >= 0 or not self._residents)
            size = 0  # known from when it first asked, or of no matter: nobody else waits
            if not (self._waiting.knows(trial) or (left >= 0 and self._waiting.empty)):
                engine = self._engine
                size, can = await self._thread.ask(lambda: (engine.size(config), anyway or engine.fits(config)))
                if not can:
                    return None
            if not self._loaded or self._attempts.over(trial, attempt):
                return False
            now = time.monotonic()
            fits = fits and self._left > 0  # memory may have left fewer places meanwhile
            if not self._waiting.may_enter(trial, size, fits=fits, judged=judged, now=now, stays=stays):
                return False
            self._coming[trial] = config, checkpoint  # first: the thread takes residents that are not for the engine's
            self._residents[trial] = parameters
            self._places.came(trial, alone=alone)
            self._bytes_left = left
        return True

    def _room(self, *more: TrialConfig) -> int:
        """Bytes that all residents leave, and these trials more."""
        coming = list(self._coming.values())  # at once: the loop may add to them
        return self._engine.room(*(config for config, _ in coming), *more)

    async def advance(self, trial: str, until: int) -> dict[str, Any]:
        """Train a resident trial up to a step, evaluate it, and return its report.

        Raises:
            TrialFailed: the trial cannot go on, for a reason of its own.
            HostFailed: it can, elsewhere.
        """
        try:
            if trial in self._coming:
                failure = await self._thread.ask(lambda: self._let_in(trial))
                if failure is not None:
                    raise failure
            else:
                self._is_new_no_more(trial)  # not before: until its seat has put away what it came to, that can be lost
            if trial not in self._residents:
                raise self._is_not_here(trial)
            return await asyncio.wrap_future(self._thread.aim(trial, until))
        except Exception as error:
            self._is_new_no_more(trial)
            if isinstance(error, HostFailed):
                self._waiting.changed()  # it was sent away, and its place is free
            raise

    def _is_not_here(self, trial: str) -> HostFailed:
        return HostFailed(f"trial {trial} is not on {self.name}")

    def _let_in(self, trial: str) -> TrialFailed | HostFailed | None:
        """Give the engine a trial, if it has not left again; why it cannot have it, and it is resident no more.

        Where that is for lack of memory beside others, though it should fit, the trial may go on elsewhere, or here a
        little later.
        """
        if trial not in self._coming:
            return None
        config, checkpoint = self._coming.pop(trial)
        beside = len(self._residents.keys() - self._coming.keys()) - 1
        try:
            self._engine.admit(trial, config, checkpoint)
        except Exception as error:
            del self._residents[trial]
            self._bytes_left = self._room()
            if not isinstance(error, InputError | TrialFailed):
                raise
            if not beside or not str(error).startswith(OUT_OF_MEMORY):
                return TrialFailed(str(error))  # no other host would take it
            self._places.hold_at_most(beside)
            return HostFailed(f"{error}, with {beside + 1} trials resident")
        return None

    def _is_new_no_more(self, trial: str) -> None:
        """It has reported, and its seat has asked on, or it is to be here no longer."""
        if self._places.is_new_no_more(trial):
            self._waiting.changed()

    async def snapshot(self, trial: str) -> Checkpoint:
        """The checkpoint of a resident trial."""
        return await self._thread.ask(lambda: self._engine.snapshot(trial))

    async def save_all(self, run: Folder) -> list[tuple[int, int, str]]:
        """End all training, keep a checkpoint of every resident trial, and take no more of them.

        Args:
            run: the run directory.

        Returns:
            Trial, step and the checkpoint's path in the run directory, of those that could be written.
        """

        def save() -> list[tuple[int, int, str]]:
            self._loaded = False
            self._thread.stop()
            kept = []
            for trial in sorted(self._residents, key=lambda trial: (trial in self._coming, trial)):
                try:
                    if self._let_in(trial) is not None:
                        continue
                    saved = self._engine.snapshot(trial)
                    path = Shelf(run, int(trial)).put_unreported(saved, self._residents[trial])
                except OSError as error:
                    logger.warning("trial %s is not kept: %s", trial, error)
                    if isinstance(error, StoreError):  # which has been asked for long
                        break
                except Exception:  # the device's, or a fault of ours: those that are kept are so all the same
                    logger.exception("%s keeps no more of its trials", self.name)
                    break
                else:
                    kept.append((int(trial), step_of(saved), path))
            return kept

        return await self._thread.ask(save)

    async def release(self, trial: str, attempt: int | None = None) -> None:
        """Let a trial go, whether it is resident, waits, or is about to; nothing happens where it does none of that.

        Args:
            attempt: of the trial, which is over; a later one stays. None: the trial has ended.
        """
        if self._attempts.end(trial, attempt):
            await self._leave(trial)

    async def _leave(self, trial: str) -> None:
        self._waiting.forget(trial)
        if trial not in self._residents:
            self._is_new_no_more(trial)
            return
        self._bytes_left = await self._thread.ask(lambda: self._let_go(trial))
        self._is_new_no_more(trial)
        self._waiting.changed()

    def _let_go(self, trial: str) -> int:
        self._thread.let_go(trial)
        if trial in self._residents:  # whoever else let it go may have been first
            try:
                if self._coming.pop(trial, None) is None:
                    self._engine.release(trial)
            finally:
                del self._residents[trial]  # here, not on the loop: what is asked next may be to save them all
        return self._room()

    def _break_off(self, error: Exception) -> None:
        """Take no trials any more, and tell those that are here: on another host they may go on."""
        logger.exception("%s cannot go on", self.name)
        failure = error if isinstance(error, HostFailed) else HostFailed(f"{type(error).__name__}: {error}")
        self._loaded = False
        self._thread.stop(failure)
        if not self._end.done():
            self._end.set_exception(failure)

    def _train(self, goals: Mapping[str, Goal]) -> None:
        """One step of every trial that has a goal, and the reports of those that are there."""
        here = self._residents.keys() - self._coming.keys()
        for trial in goals.keys() - here:  # it left as its goal was on its way, and may be about to come again
            self._thread.answer(trial).set_exception(self._is_not_here(trial))
        behind = [t for t in goals if t in here and self._engine.position(t) < goals[t].until]
        outcomes = self._engine.step(behind) if behind else {}
        self._places.hold_at_most(self._engine.pack_limit)
        for trial, outcome in outcomes.items():
            if isinstance(outcome, TrialFailed | HostFailed):
                self._answer(trial, outcome)
        there = [t for t in goals if self._thread.has_goal(t) and self._engine.position(t) >= goals[t].until]
        if not there:
            return
        reports = self._engine.report(there)
        self._places.hold_at_most(self._engine.pack_limit)
        for trial, report in reports.items():
            self._answer(trial, report)

    def _answer(self, trial: str, outcome: Any) -> None:
        """Tell a trial's seat what became of it; one that is to go on elsewhere leaves its memory to the others."""
        report = self._thread.answer(trial)
        if isinstance(outcome, HostFailed):
            self._bytes_left = self._let_go(trial)
        if isinstance(outcome, TrialFailed | HostFailed):
            report.set_exception(outcome)
        else:
            report.set_result(outcome.to_dict() | {"host": self.name})
