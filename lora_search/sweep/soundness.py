"""On which nodes of a cluster seats may be: those that are as all others, whether a host is there or none."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from typing import Any

import ray

from lora_search.errors import SweepError
from lora_search.placement import HostPlace, Node
from lora_search.storage import Folder
from lora_search.sweep.answers import HostLost, is_done, unwrap
from lora_search.sweep.build import greet
from lora_search.sweep.cluster import Say, on_node
from lora_search.sweep.running import require_fit, unlike

ANSWER_S = 90.0
"""A node without a host that takes longer to say what it is like is not waited for. More than SEEN_S, which it may take
to find that it does not see the run directory."""


ASK_AGAIN_S = 60.0
"""Between two questions to a node that was sound, and has said that it is so no more."""


class Soundness:
    """Asks nodes what hosts say of theirs: those that have no host, and those that were sound and may be so no more.

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
        self._doubted: dict[str, float] = {}
        """Nodes that were sound, and when they said last that they are not, by the monotonic clock; infinity before."""
        self.barred: frozenset[str] = frozenset()

    def add(self, *nodes: str) -> None:
        """Nodes are as all others."""
        self._sound.update(nodes)
        for node in nodes:
            self._doubted.pop(node, None)

    def doubt(self, node: str) -> bool:
        """Ask a node anew that was sound; until it has answered so again, no seat begins there. False: it was not."""
        if node not in self._sound:
            return False
        self._sound.remove(node)
        self._doubted[node] = math.inf
        self._begin(node)
        self.barred |= {node}
        return True

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
                except HostLost:  # the node has gone
                    continue
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
        alive = {node.id for node in there}
        self._asked = {node: answer for node, answer in self._asked.items() if node in alive}
        self._doubted = {node: when for node, when in self._doubted.items() if node in alive}
        for node, answer in self._asked.items():
            if answer is not None and is_done(answer):
                self._asked[node] = None
                self._hear(node, answer)
        waits = any(answer is not None for answer in self._asked.values())
        if self._doubted and not self._sound & alive and not waits:
            raise SweepError("no node is left that can use the run directory; mend it, then --resume")
        for node, when in self._doubted.items():
            if self._asked[node] is None and time.monotonic() - when > ASK_AGAIN_S:
                self._begin(node)
        self.barred = frozenset(alive - self._sound).union(going)

    def _hear(self, node: str, answer: Any) -> None:
        try:
            require_fit(unwrap(answer))
        except SweepError as error:
            if math.isinf(self._doubted.get(node, math.inf)):  # it has not been said yet
                self._say(f"WARNING: node {node[:8]} is of no use: {error}")
            self._sound.discard(node)
            if node in self._doubted:
                self._doubted[node] = time.monotonic()
        else:
            if node in self._doubted:
                self._say(f"node {node[:8]} can use the run directory again")
            self.add(node)

    def _ask(self, there: Sequence[Node], places: Sequence[HostPlace]) -> None:
        known = self._sound.union(self._asked, (place.node for place in places))
        for node in there:
            if node.id not in known:
                self._begin(node.id)

    def _begin(self, node: str) -> None:
        ask = ray.remote(num_cpus=0, max_retries=0)(greet).options(scheduling_strategy=on_node(node))
        self._asked[node] = ask.remote(self._run)
