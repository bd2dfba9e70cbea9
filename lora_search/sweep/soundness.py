"""On which nodes of a cluster seats may be: those that are as all others, whether a host is there or none."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import ray

from lora_search.errors import SweepError
from lora_search.placement import HostPlace, Node
from lora_search.storage import Folder
from lora_search.sweep.answers import HostLost, is_done, unwrap
from lora_search.sweep.build import STORE_S, greet
from lora_search.sweep.cluster import Say, on_node
from lora_search.sweep.running import require_fit, unlike

ANSWER_S = 90.0
"""A node without a host that takes longer to say what it is like is not waited for. More than SEEN_S, which it may take
to find that it does not see the run directory."""

ASK_AGAIN_S = 60.0
"""Until a node that is not as all others, or may be so no more, is asked again."""

UNSAVED = 5
"""Seats of one trial that may find the run directory of no use between two reports, while the driver can use it."""


class Soundness:
    """Asks nodes what hosts say of theirs: those that have no host, and those that may be sound no more.

    Until it has answered, no seat begins on a node that has been seen.
    """

    def __init__(self, say: Say, run: Folder | None) -> None:
        """
        Args:
            say: prints one line to the user.
            run: the run directory, which each node must see.
        """
        self._say, self._run = say, run
        self._sound: set[str] = set()
        self._asked: dict[str, Any] = {}
        """By node, its answer; None where that has been heard."""
        self._since: dict[str, float] = {}
        """When they were asked last, by the monotonic clock."""
        self._doubted: dict[str, float] = {}
        """Nodes that are not sound, and may yet be; when they are to be asked."""
        self._refused: set[str] = set()
        """Those of them that have said so."""
        self._unsaved: Counter[int] = Counter()
        """How many seats of a trial were not able to use the run directory since its last report."""
        self.barred: frozenset[str] = frozenset()

    @property
    def doubted(self) -> Collection[str]:
        """Nodes that are not sound, and may yet be."""
        return self._doubted.keys()

    def add(self, *nodes: str) -> None:
        """Nodes are as all others."""
        self._sound.update(nodes)
        self._refused.difference_update(nodes)
        for node in nodes:
            self._doubted.pop(node, None)

    def unsaved(self, trial: int, why: str, node: str | None) -> None:
        """A seat cannot use the run directory: no other gets a place on that node until it says that it can.

        It is asked in some time, and not at once: what a seat has found out may be more than the node would say.

        Args:
            trial: whose seat.
            node: None where no other would be able to either.

        Raises:
            SweepError: nor is this process able to, or others on which the trial has been.
        """
        self._unsaved[trial] += 1
        ended = f"the run directory cannot be written to: {why}; mend it, then --resume"
        if node is None or self._run is None or self._unsaved[trial] > UNSAVED:
            raise SweepError(ended)
        try:
            Folder(self._run.place, STORE_S).check()
        except OSError as error:
            raise SweepError(ended) from error
        if node in self._sound:
            self._say(f"WARNING: node {node[:8]} cannot use the run directory: {why}; its trials go on elsewhere")
            self.doubt(node)

    def doubt(self, node: str) -> None:
        """Have a node asked in some time; until it has answered that it is as all others, no seat begins there."""
        self._sound.discard(node)
        self._asked[node] = None  # what it has been asked before may be answered by what was then
        self._doubted[node] = time.monotonic() + ASK_AGAIN_S
        self.barred |= {node}

    def reported(self, trial: int) -> None:
        """A trial has come further: what its seats have met with before is over."""
        self._unsaved.pop(trial, None)

    def answers(self, there: Sequence[Node], places: Sequence[HostPlace]) -> list[tuple[str, Any]]:
        """What each node without a host says (`greet`), by its id; who is silent for ANSWER_S is left out.

        Args:
            places: of all hosts.

        Raises:
            InputError: a node cannot even say it.
        """
        self._ask(there, places)
        if self._asked:
            ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=ANSWER_S)
        heard = []
        for node, answer in self._asked.items():
            if is_done(answer):
                self._asked[node] = None
                try:
                    heard.append((node, unwrap(answer)))
                except HostLost:  # the node has gone, or has ended what was to answer
                    self.doubt(node)
                except SweepError as error:
                    raise unlike(node, error) from None
        return heard

    def look(
        self,
        there: Sequence[Node],
        places: Sequence[HostPlace],
        going: Collection[str] = (),
        unfit: Collection[str] = (),
    ) -> None:
        """See which nodes have come, gone, or answered. Never waits.

        Args:
            going: nodes that will be gone soon.
            unfit: nodes that are of no use, as has been said.

        Raises:
            SweepError: there is none left on which a seat may be.
        """
        self._ask([node for node in there if node.id not in {*going, *unfit}], places)
        alive, now = {node.id for node in there}, time.monotonic()
        self._asked = {node: answer for node, answer in self._asked.items() if node in alive}
        self._doubted = {node: when for node, when in self._doubted.items() if node in alive}
        for node, answer in list(self._asked.items()):
            if answer is not None and is_done(answer):
                self._hear(node, answer)
            elif answer is not None and now - self._since[node] > ANSWER_S:
                self._refuse(node, "it does not answer")
        for node, when in self._doubted.items():
            if self._asked.get(node) is None and now > when:
                self._begin(node)
        new = any(answer is not None for node, answer in self._asked.items() if node not in self._doubted)
        if self._doubted and not self._sound & alive and not new and self._doubted.keys() <= self._refused:
            raise SweepError("no node is left that can use the run directory; mend it, then --resume")
        self.barred = frozenset(alive - self._sound).union(going)

    def _hear(self, node: str, answer: Any) -> None:
        self._asked[node] = None
        try:
            require_fit(unwrap(answer))
        except SweepError as error:
            self._refuse(node, str(error))
        else:
            if node in self._doubted:
                self._say(f"node {node[:8]} is of use by now")
            self.add(node)

    def _refuse(self, node: str, why: str) -> None:
        """A node is not as all others; it is asked again in some time."""
        if node not in self._refused:
            self._say(f"WARNING: node {node[:8]} is of no use: {why}")
        self._refused.add(node)
        self.doubt(node)

    def _ask(self, there: Sequence[Node], places: Sequence[HostPlace]) -> None:
        known = self._sound.union(self._asked, self._doubted, (place.node for place in places))
        for node in there:
            if node.id not in known:
                self._begin(node.id)

    def _begin(self, node: str) -> None:
        ask = ray.remote(num_cpus=0, max_retries=0)(greet).options(scheduling_strategy=on_node(node))
        self._asked[node], self._since[node] = ask.remote(self._run), time.monotonic()
