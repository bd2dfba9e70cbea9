"""A host's own view of its memory: what its trials would take, corrected by what they have been seen to take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_search.machine import memory_bytes
from lora_search.memory.corners import Crowd, corners, smallest
from lora_search.memory.estimate import BaseMemory
from lora_search.memory.values import TrialShape
from lora_search.space import TrialConfig
from lora_search.spec import SweepSpec
from lora_search.targets import resolve

if TYPE_CHECKING:
    import torch

GAPS = 0.04
"""Share of a GPU that torch's allocator cannot use because free pieces are too small."""

BESIDE_BYTES, SEAT_BYTES = 700 << 20, 80 << 20
"""Of a machine without GPUs: the sweep's own process with Ray's, and each of a host's seats. In a run of the demo the
first took at most 505 MB (proportional set size; alone at its most 950 MB while Ray starts, when no host has loaded
anything); eight seats took 555 MiB (analysis/benchmarks/memory.py)."""

HOPE = 0.85
"""The least that trials are expected to take, of what is predicted."""

BOUNDS = (0.5, 2.0)
"""Of the correction: beyond, something else than these trials has been measured."""


class Gauge:
    """Says whether trials fit together on one host, and how much room is left."""

    def __init__(self, spec: SweepSpec, memory: BaseMemory, capacity: int, longest: int, most: int) -> None:
        """
        Args:
            capacity: bytes that the host may take, of each of its GPUs.
            longest: tokens of the longest row.
            most: trials that will ever be together.
        """
        self.capacity = capacity
        self.correction = 1.0
        """What was measured, of what was predicted."""
        self._memory = memory
        self._longest = longest
        self._most = most
        found = corners(spec, memory.tree, longest)
        self._smallest, self._crowd = smallest(found, memory).shape, Crowd.of(found, memory)
        self._most_predicted = 0
        self._trial_bytes: dict[TrialShape, int] = {}

    def room(self, configs: Sequence[TrialConfig]) -> int:
        """Bytes that a host with these trials has left, on its fullest GPU; negative where they do not fit together.

        Where so many of the largest trials of the space would fit, it is not looked at more closely.
        """
        at_least = self.room_for_largest(len(configs))
        if at_least >= 0:
            return at_least
        return self.capacity - int(self.correction * self._predicted(configs))

    def room_for_largest(self, count: int) -> int:
        """Bytes that so many of the largest trials of the space leave, whatever target sets they have."""
        return self.capacity - int(self.correction * self._crowd.total(count, self._memory))

    def together(self) -> int:
        """How many of the largest trials of the space fit at once, at most as many as will ever be together."""
        return max((count for count in range(2, self._most + 1) if self.room_for_largest(count) >= 0), default=1)

    def ever(self) -> int:
        """How many trials might fit at once, were all of them the space's smallest: at least one."""
        if self.room_for_largest(self._most) >= 0:
            return self._most
        counts = range(2, self._most + 1)
        fit = (n for n in counts if HOPE * self._memory.host([self._smallest] * n).total <= self.capacity)
        return max(fit, default=1)

    def size(self, config: TrialConfig) -> int:
        """Bytes that a trial adds to its host; 0 where as many of the largest fit as will ever be together."""
        if self.room_for_largest(self._most) >= 0:
            return 0
        return self.trial_bytes(config)

    def trial_bytes(self, config: TrialConfig) -> int:
        """Bytes of a trial by itself: its state, and a pass over its longest rows."""
        shape = self._shape(config)
        if shape not in self._trial_bytes:  # a fifth of a second each
            self._trial_bytes[shape] = self._memory.trial(shape).total
        return self._trial_bytes[shape]

    def saw(self, configs: Sequence[TrialConfig], peak: int, passing: Sequence[TrialConfig] | None = None) -> None:
        """Learn from the most bytes that the host has ever taken, the last time with these trials.

        The peak is compared with the largest prediction so far: neither ever falls.

        Args:
            passing: those of the trials that were in a pass at once; None for all.
        """
        if 2 * self._crowd.total(len(configs), self._memory) <= self.capacity:
            return  # there is room enough, however wrong a prediction is
        self._most_predicted = max(self._most_predicted, self._predicted(configs, passing))
        low, high = BOUNDS
        self.correction = min(high, max(low, peak / self._most_predicted))

    def _predicted(self, configs: Sequence[TrialConfig], passing: Sequence[TrialConfig] | None = None) -> int:
        shapes = None if passing is None else [self._shape(config) for config in passing]
        return self._memory.host([self._shape(config) for config in configs], shapes).total

    def _shape(self, config: TrialConfig) -> TrialShape:
        return TrialShape(
            targets=resolve(self._memory.tree, config.lora.target_modules),
            rank=config.lora.rank,
            dropout=config.lora.dropout > 0,
            batch_size=config.training.batch_size,
            length=self._longest,
        )


def usable_bytes(devices: Sequence[torch.device], hosts: int, trials: int) -> int:
    """What one of so many hosts on this machine may take: of each of its GPUs, or of what memory the sweep leaves.

    Args:
        trials: of which the host may have seats.
    """
    if devices[0].type == "cuda":
        import torch

        free = [torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) for device in devices]
        return int(min(free) * (1 - GAPS))
    return max(0, (memory_bytes() - BESIDE_BYTES) // hosts - trials * SEAT_BYTES)
