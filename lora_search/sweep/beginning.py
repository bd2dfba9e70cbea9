"""The hosts of a sweep as it begins: they start, say what their nodes are like, and load the base."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import ray

from lora_search.errors import InputError, SweepError
from lora_search.placement import HostPlace
from lora_search.spec import SweepSpec
from lora_search.storage import Folder
from lora_search.sweep.answers import DataLost, HostLost, NodeUnfit, is_done, unwrap
from lora_search.sweep.build import Build
from lora_search.sweep.cluster import Say, nodes
from lora_search.sweep.roster import LOOK_EVERY_S, Roster
from lora_search.sweep.running import RunningHost, as_they_load, require_same, unlike, what_is_held
from lora_search.sweep.shared_data import SharedData
from lora_search.sweep.soundness import Soundness

T = TypeVar("T")

START_S = 60.0
"""A host that does not run by then is not waited for, if others do: something else holds what Ray would give it."""

WITHOUT = "WARNING: the sweep goes on without some hosts: "
NONE_RUNS = "WARNING: no host runs at present: "


class Beginning(Roster):
    """The hosts from their start until they have loaded the base, whenever in a sweep that is."""

    def __init__(self, spec: SweepSpec, build: Build, say: Say, run: Folder | None) -> None:
        """Start them over all nodes; arguments and errors are the roster's."""
        super().__init__(spec, build, say, run)
        self._soundness = Soundness(say, run)
        self._data = SharedData()
        self.check: Callable[[], None] | None = None
        """What every host has to pass that loads the base from now on; raises NodeUnfit."""

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
        return as_they_load(hosts, others=bool(self._ready), say=self._say)

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
