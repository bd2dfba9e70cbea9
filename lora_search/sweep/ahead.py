"""What is done for the end of a sweep while its last trials run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_search.best import merge_ahead
from lora_search.results import ended_count
from lora_search.space import planned_trials
from lora_search.spec import SweepSpec
from lora_search.sweep.hosts import Hosts
from lora_search.tracking import Observer, State


class MergeAhead(Observer):
    """Has the host that merges make ready for it, as soon as a host has no trial any more and gets none."""

    def __init__(self, spec: SweepSpec, hosts: Hosts) -> None:
        self._hosts = hosts
        self._left = planned_trials(spec)
        self._done = False

    def past(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._left -= ended_count(rows)

    def trial_ended(self, trial: int, state: State, reason: str | None) -> None:
        self._left -= 1
        if self._left < len(self._hosts.places) and not self._done:
            self._done = True
            self._hosts.ask_last(merge_ahead)
