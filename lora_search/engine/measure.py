"""Adapters on one base, measured together on a split."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lora_search.data import FlatRows, TokenizedData, TokenSplit, flatten, rows_by_length
from lora_search.engine.adapter import FlatAdapter
from lora_search.engine.evaluate import Evaluation
from lora_search.engine.forward import Measured, PackedBase
from lora_search.engine.lanes import Lanes
from lora_search.engine.pack import Share
from lora_search.engine.trouble import free_memory, is_out_of_memory

logger = logging.getLogger(__name__)

EVALUATION_TOKENS = {"cpu": 4096, "cuda": 32_768}
"""Tokens of a pass without gradients, over all trials in it."""

EVALUATED_TOGETHER = {"cpu": 2, "cuda": 8}
"""Trials in such a pass. Each has its share of the tokens, however many there are: the last bits of a sum depend on
what is summed together (analysis/benchmarks/NOTES.md)."""


class Measure:
    """Measures adapters, as many at once as memory allows."""

    def __init__(self, packed: PackedBase, lanes: Lanes, data: TokenizedData) -> None:
        self._packed = packed
        self._lanes = lanes
        self._data = data
        kind = packed.base.device.type
        self.together = EVALUATED_TOGETHER[kind]
        """In a pass; fewer once memory has run out."""
        self.tokens = EVALUATION_TOKENS[kind] // self.together
        """Of each in a pass; fewer once memory has run out for one alone."""

    def split(self, adapters: Sequence[FlatAdapter | None], split: str, by_row: bool) -> list[Evaluation]:
        """The standing of each adapter on a split; None is the untrained base.

        Where memory runs out, passes have fewer adapters from here on, and where they have one, fewer rows.

        Args:
            by_row: keep each row's loss too.
        """
        rows = {"validation": self._data.validation, "test": self._data.test}[split]
        while True:
            try:
                return self._in_passes(adapters, rows, by_row)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or not self._takes_less(len(adapters), int(rows.lengths_N.max())):
                    raise
            free_memory(self._packed.base.device)
            logger.warning(
                "out of memory in an evaluation; from now on %d tokens of %d trials a pass", self.tokens, self.together
            )

    def _takes_less(self, adapters: int, longest: int) -> bool:
        """Have passes of fewer trials, or of fewer tokens; False where one row of one trial is too much."""
        if min(self.together, adapters) > 1:
            self.together = min(self.together, adapters) // 2
        elif self.tokens > longest:
            self.tokens //= 2
        else:
            return False
        return True

    def _in_passes(self, adapters: Sequence[FlatAdapter | None], rows: TokenSplit, by_row: bool) -> list[Evaluation]:
        groups = list(rows_by_length(rows, self.tokens))
        batches = [flatten(rows, picked) for picked in groups]
        targets = sum(len(batch.targets_M) for batch in batches)

        def measure(work: tuple[Sequence[FlatAdapter | None], FlatRows]) -> list[Measured]:
            some, batch = work
            return self._packed.measure(self._packed.pack([Share(batch, adapter) for adapter in some]))

        crowds = [adapters[start : start + self.together] for start in range(0, len(adapters), self.together)]
        passes = iter(self._lanes.map(measure, [(some, batch) for some in crowds for batch in batches]))
        found = []
        for _ in crowds:
            for of_one in zip(*itertools.islice(passes, len(batches)), strict=True):
                loss, hits = sum(measured.loss for measured in of_one), sum(measured.hits for measured in of_one)
                evaluation = Evaluation(loss / targets, hits / targets, targets)
                if by_row:
                    losses_N, targets_N = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
                    for measured, picked, batch in zip(of_one, groups, batches, strict=True):
                        losses_N[picked] = batch.sums_by_row(measured.losses_M.cpu().numpy())
                        targets_N[picked] = batch.targets_by_row
                    evaluation = replace(evaluation, losses_N=losses_N, targets_N=targets_N)
                found.append(evaluation)
        return found
