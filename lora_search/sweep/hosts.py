"""The hosts of a sweep: what they are asked, and how they are looked after."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import ray

from lora_search.errors import OUT_OF_MEMORY, InputError, SweepError
from lora_search.placement import HostPlace, Node
from lora_search.spec import SweepSpec
from lora_search.storage import Folder
from lora_search.sweep.answers import DataLost, HostLost, NodeUnfit, NodeUnready, is_done, unwrap
from lora_search.sweep.build import Build
from lora_search.sweep.cluster import Say, nodes, warned
from lora_search.sweep.roster import LOOK_EVERY_S, Roster
from lora_search.sweep.running import RunningHost, as_they_load, require_same, unlike, what_is_held
from lora_search.sweep.shared_data import SharedData
from lora_search.sweep.soundness import Soundness

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

START_S = 60.0
"""A host that does not run by then is not waited for, if others do: something else holds what Ray would give it."""

SAVE_S = 60.0
"""A host that takes longer to save its trials when the sweep is interrupted is not waited for."""

WITHOUT = "WARNING: the sweep goes on without some hosts: "
NONE_RUNS = "WARNING: no host runs at present: "


class Hosts(Roster):
    """The hosts of a sweep. Nodes that join get hosts, nodes that leave lose theirs, a host that dies is replaced.

    Seats find them by name.
    """

    def __init__(self, spec: SweepSpec, build: Build, say: Say = lambda line: None, run: Folder | None = None) -> None:
        """Start them over all nodes; arguments and errors are the roster's."""
        super().__init__(spec, build, say, run)
        self._soundness = Soundness(say, run)
        self._looked = time.monotonic()
        self._data = SharedData()
        self._excused: set[int] = set()
        """Trials whose loss is not to be held against them; nobody has asked since."""
        self.check: Callable[[], None] | None = None
        """What every host has to pass that loads the base from now on; raises NodeUnfit."""

    @property
    def barred(self) -> Collection[str]:
        """Nodes on which no seat may be, as far as is known."""
        return self._soundness.barred

    def require_same_nodes(self) -> None:
        """
        Raises:
            InputError: a node has other versions of what decides a result, or does not see the run directory; it
                says which.
        """
        greeted = [(host.place.node, said) for host, said in self._each(_greeting)]
        greeted += self._soundness.answers(nodes(), self.places)
        require_same(greeted, self._spec.output)
        for host in self._begun:
            host.greeting = None
        self._soundness.add(*(node for node, _ in greeted))
        self._soundness.look(nodes(), self.places)

    def prepare(self, work: Callable[[HostPlace], tuple[T, Any]], warm: Callable[[], None]) -> T:
        """Have one host prepare the data for all; what it says of it.

        Args:
            work: given the host's place; what is said of the data, and the data.
            warm: what the other hosts do meanwhile.
        """
        while True:
            self._await_start()
            first, *others = self._begun
            with self._lost_if_so(first):
                self._hear(first)
                self._data.begin(first, work)
                for host in others:
                    host.actor.run.remote(warm)
                return cast("T", self._data.said())
            self._replace_all()

    def load(self) -> None:
        """Have every host load the base, for trials on the data.

        One that is not able to is lost where another is: it may be the one that the model hub refuses for a moment.
        One that takes far longer than another is given up, and begins anew beside the sweep.

        Raises:
            InputError, SweepError: no host can be started; the message says why.
        """
        self._each(self._loaded, self._load, self._as_they_load)

    def _as_they_load(self, hosts: Sequence[RunningHost]) -> Iterator[RunningHost]:
        return as_they_load(hosts, others=bool(self._ready))

    def _loaded(self, host: RunningHost) -> None:
        """Wait until a host has loaded the base.

        Raises:
            HostLost: it has not, or is not able to, and another has.
            InputError, SweepError: as `SharedData.loaded`.
        """
        if not is_done(host.loading):
            raise HostLost("it takes far longer than another to load the base, and begins anew")
        try:
            self._data.loaded(host)
        except HostLost:
            raise
        except SweepError as error:
            if self._ready:
                raise HostLost(str(error)) from error
            raise

    def _load(self, host: RunningHost) -> None:
        """Have a host begin to load the base."""
        self._hear(host)
        self._data.load(host, self.check)

    def _hear(self, host: RunningHost) -> None:
        """Hear what a host says first, if it has not been heard: its node is as all others then.

        Raises:
            HostLost: it is not.
        """
        if host.hear():
            self._soundness.add(host.place.node)

    def ask_all(self, work: Callable[[], T]) -> list[T]:
        """What the hosts that have loaded the base answer; one that is lost meanwhile says nothing."""
        found = []
        for answer in [host.actor.run.remote(work) for host in self._ready]:
            with suppress(HostLost):
                found.append(unwrap(answer))
        return found

    def _await_start(self) -> None:
        """Wait until every host runs; from START_S on, no more for one that does not, if another does."""
        end = time.monotonic() + START_S
        said = False
        while True:
            for host in self._running.values():
                if host.late and (is_done(host.started) or not self._begun):
                    host.late = False
            waiting = [host for host in self._begun if not is_done(host.started)]
            if not waiting:
                return
            left = end - time.monotonic()
            ray.wait([host.started for host in waiting], num_returns=len(waiting), timeout=max(LOOK_EVERY_S, left))
            if left > 0:
                continue
            waiting = [host for host in waiting if not is_done(host.started)]
            if waiting and len(waiting) < len(self._begun):
                self._say(WITHOUT + what_is_held(waiting))
                for host in waiting:
                    host.late = True
            elif waiting and not said:
                self._say(NONE_RUNS + what_is_held(waiting))
                said = True

    def _each(
        self,
        answer: Callable[[RunningHost], T],
        ask: Callable[[RunningHost], None] = lambda host: None,
        in_turn: Callable[[Sequence[RunningHost]], Iterable[RunningHost]] = lambda hosts: hosts,
    ) -> list[tuple[RunningHost, T]]:
        """What every host answers. One that is lost before it has is left out, and replaced where no other is left.

        Args:
            answer: waits for it.
            ask: done for all before any is waited for.
            in_turn: hosts in the order in which they are waited for.

        Raises:
            InputError, SweepError: as the host said, or no host is left.
        """
        answered: dict[str, T] = {}
        while True:
            self._await_start()
            waiting = [host for host in self._begun if host.place.name not in answered]
            if not waiting:
                return [(host, answered[host.place.name]) for host in self._begun]
            asked = []
            for host in waiting:
                with self._lost_if_so(host):
                    ask(host)
                    asked.append(host)
            for host in in_turn(asked):
                with self._lost_if_so(host):
                    answered[host.place.name] = answer(host)
            self._replace_all()

    @contextmanager
    def _lost_if_so(self, host: RunningHost) -> Iterator[None]:
        """Lose a host that turns out to be lost here.

        Raises:
            InputError, SweepError: as the host said.
        """
        try:
            yield
        except DataLost:
            pass  # it has to be asked again
        except HostLost as lost:
            self._lose(host, lost)
        except InputError:
            raise
        except SweepError as error:
            raise SweepError(f"{host.place.name} on node {host.place.node[:8]}: {error}") from error

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
        self._soundness.look(there, self.places, going, self._losses.unfit)
        late = [host for host in self._begun if now - host.since > START_S and not is_done(host.started)]
        for host in late:
            host.late = True
        if late:
            self._say((WITHOUT if self._begun else NONE_RUNS) + what_is_held(late))

    def _look_at(self, host: RunningHost, there: Sequence[Node], going: Collection[str]) -> None:
        """See how far a host is that has not loaded the base, and have it go on.

        Args:
            going: nodes that will be gone soon.

        Raises:
            SweepError: it is lost, or of no use; the message says why.
        """
        host.require_alive(there)
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

    def excuses(self, trial: int) -> bool:
        """Whether the loss of a trial is not to be held against it, but once: its host kept it as it stood, since its
        node was to go, or had no memory for it beside others, or its seat's node cannot use the run directory."""
        excused = trial in self._excused
        self._excused.discard(trial)
        return excused

    def release(self, trial: int, host: str | None = None) -> None:
        """Let a trial go that has ended, from the host of that name, or wherever it is resident."""
        self._shunned.ended(trial, self._running.values())
        for other in self._running.values():
            if host in (None, other.place.name):
                other.actor.release.remote(str(trial))


def _greeting(host: RunningHost) -> Any:
    """What a host says first; waits for it.

    Raises:
        InputError: there can be none on its node.
        HostLost: it was.
    """
    try:
        return unwrap(host.greeting)
    except NodeUnfit as error:
        raise unlike(host.place.node, error) from error
