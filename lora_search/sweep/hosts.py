"""The hosts of a sweep: what they are asked, and how they are looked after."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, TypeVar, cast

import ray

from lora_search.errors import OUT_OF_MEMORY, SweepError
from lora_search.placement import Node
from lora_search.spec import SweepSpec
from lora_search.storage import Folder
from lora_search.sweep import beginning
from lora_search.sweep.answers import DataLost, HostLost, NodeUnready, is_done, unwrap
from lora_search.sweep.beginning import Beginning
from lora_search.sweep.build import Build
from lora_search.sweep.cluster import Say, nodes, warned
from lora_search.sweep.roster import LOOK_EVERY_S
from lora_search.sweep.running import RunningHost, what_is_held

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

SAVE_S = 60.0
"""A host that takes longer to save its trials when the sweep is interrupted is not waited for."""


class Hosts(Beginning):
    """The hosts of a sweep. Nodes that join get hosts, nodes that leave lose theirs, a host that dies is replaced.

    Seats find them by name.
    """

    def __init__(self, spec: SweepSpec, build: Build, say: Say = lambda line: None, run: Folder | None = None) -> None:
        """Start them over all nodes; arguments and errors are the roster's."""
        super().__init__(spec, build, say, run)
        self._looked = time.monotonic()
        self._excused: set[int] = set()
        """Trials whose loss is not to be held against them; nobody has asked since."""

    @property
    def barred(self) -> Collection[str]:
        """Nodes on which no seat may be, as far as is known."""
        return self._soundness.barred

    def ask_all(self, work: Callable[[], T]) -> list[T]:
        """What the hosts that have loaded the base answer; one that is lost meanwhile says nothing."""
        found = []
        for answer in [host.actor.run.remote(work) for host in self._ready]:
            with suppress(HostLost):
                found.append(unwrap(answer))
        return found

    def look(self) -> None:
        """See which hosts and nodes have come and gone, and put a host where there should be one. Never waits.

        Raises:
            SweepError: no host is left, and none can be started.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        there, going = nodes(), warned()
        for host in list(self._running.values()):
            try:
                self._look_at(host, there, going)
            except NodeUnready as lost:
                self._lose(host, lost, counts=len(self._running) == 1)  # or it is asked when it can
                self._soundness.doubt(host.place.node)
            except HostLost as lost:
                self._lose(host, lost, "its trials go on elsewhere from their last checkpoints" * host.loaded)
            except SweepError as error:
                self._lose(host, HostLost(str(error)))
        self._shunned.look(self._running.values())
        doubted = self._soundness.doubted if self._running else ()
        self._fill([node for node in there if node.id not in going and node.id not in doubted])
        self._soundness.look(there, self.places, going, self._losses.unfit(there))
        late = [host for host in self._begun if now - host.since > beginning.START_S and not is_done(host.started)]
        for host in late:
            host.late = True
        if late:
            self._say((beginning.WITHOUT if self._begun else beginning.NONE_RUNS) + what_is_held(late))

    def _look_at(self, host: RunningHost, there: Sequence[Node], going: Collection[str]) -> None:
        """See how far a host is that has not loaded the base, and have it go on.

        Args:
            going: nodes that will be gone soon.

        Raises:
            SweepError: it is lost, or of no use; the message says why.
        """
        host.require_alive(there)
        if is_done(host.started) and (stuck := host.gets_stuck()) is not None:
            self._say(stuck)
        if host.place.node in going:
            if (kept := host.leave(self._run)) is not None:
                self._excused.update(kept)
                raise HostLost("its node is to go")
            return
        if host.loaded:
            host.heed()
            return
        if host.loading is None:
            if host.greeting is None or is_done(host.greeting):
                self._load(host)
        elif is_done(host.loading):
            with suppress(DataLost):
                self._data.loaded(host)

    def _await_ready(self) -> list[RunningHost]:
        """Those that have loaded the base, where there are such on nodes that stay and can use the run directory.

        Waits for those that come after all others were lost.

        Raises:
            SweepError: none can be started.
        """
        while not self._ready:
            time.sleep(LOOK_EVERY_S)
            self.look()
        unfit = warned().union(self.barred)
        return [host for host in self._ready if host.place.node not in unfit] or self._ready

    def ask_one(self, work: Callable[[Any], T]) -> T:
        """Have one host do something with its engine.

        Raises:
            HostLost: it was; `renew` makes another attempt possible.
        """
        host = self._await_ready()[0]
        try:
            return cast("T", unwrap(host.actor.run_with_engine.remote(work)))
        except HostLost as lost:
            self._lose(host, lost, "what it did is done again")
            raise

    def ask_last(self, work: Callable[[], None]) -> None:
        """Have the host do something that merges at the end, as it seems now; nobody waits for it."""
        for host in self._ready[-1:]:
            host.actor.run.remote(work)

    def finish(self, test: Callable[[Any], T], merge: Callable[[bool, Any], R]) -> tuple[T, R]:
        """Have one host test with its engine, and the last one merge on its device, which it makes free for that.

        Args:
            merge: given whether that is a GPU, and the data.

        Raises:
            HostLost: one of the two was, or the data; `renew` makes another attempt possible.
        """
        able = self._await_ready()
        first, last = able[0], able[-1]
        tested = first.actor.run_with_engine.remote(test)
        if first is last:
            ray.wait([tested])
        ray.wait([last.actor.unload.remote()])
        merged = last.actor.run.remote(merge, last.place.gpus > 0, self._data.for_work(last))
        host = first
        try:
            test_says = unwrap(tested)
            host = last
            return test_says, unwrap(merged)
        except DataLost:
            self._data.renew(last)
            raise
        except HostLost as lost:
            self._lose(host, lost, "what it did is done again")
            if host is not last:  # what it merges is in the way of the next attempt, and its base is gone
                self._drop(last)
            raise

    def save_all(self, run: Folder) -> list[tuple[int, int, str]]:
        """End all training, and keep a checkpoint of every resident trial: trial, step, path in the run directory.

        A host that is lost, or cannot write, keeps none; its trials have those of their last reports.
        """
        saved = []
        answers = [host.actor.save_all.remote(run) for host in self._ready]
        if answers:
            ray.wait(answers, num_returns=len(answers), timeout=SAVE_S)
        for answer in answers:
            try:
                saved += ray.get(answer, timeout=0)
            except ray.exceptions.RayError as error:
                logger.warning("a host kept no checkpoints: %s", error)
        return saved

    def unsaved(self, trial: int, why: str, node: str | None) -> None:
        """A seat cannot use the run directory, which is not held against its trial; arguments, errors: `Soundness`."""
        self._excused.add(trial)
        self._soundness.unsaved(trial, why, node)

    def lost(self, trial: int, host: str, why: str) -> None:
        """A trial cannot go on with the host of that name: it goes on elsewhere, where it can.

        Where memory was short, the host holds fewer from now on, which is held against nobody.
        """
        if why.startswith(OUT_OF_MEMORY):
            self._excused.add(trial)
        else:
            self._shunned.lost(trial, host, self._running.values())

    def reported(self, trial: int, host: str) -> None:
        """A trial has come further, and what it and its seats have met with before is over; and so has its host."""
        self._soundness.reported(trial)
        self._shunned.reported(trial, host, self._running.values())
        on = self._running.get(host)
        if on is not None and not on.has_reported:
            on.has_reported = True
            self._losses.trained(on)

    def excuses(self, trial: int) -> bool:
        """Whether the loss of a trial is not to be held against it, but once: its host kept it as it stood, since its
        node was to go, or had no memory for it beside others, or its seat's node cannot use the run directory."""
        excused = trial in self._excused
        self._excused.discard(trial)
        return excused

    def vacate(self, trial: int, attempt: int) -> None:
        """An attempt of a trial is over, wherever it is resident, waits, or is about to: its seat is no more.

        The trial itself may wait long for its next one, behind others that need its place.
        """
        for host in self._running.values():
            host.actor.release.remote(str(trial), attempt)

    def release(self, trial: int, host: str | None = None) -> None:
        """Let a trial go that has ended, from the host of that name, or wherever it is resident."""
        self._shunned.ended(trial, self._running.values())
        for other in self._running.values():
            if host in (None, other.place.name):
                other.actor.release.remote(str(trial))
