"""Adapters on one base, measured together on a split."""

from __future__ import annotations

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

EVALUATION_TOKENS = {"cpu": 2048, "cuda": 32_768}
"""Tokens of a pass without gradients, over all trials in it."""


class Measure:
    """Measures adapters, as many at once as memory allows."""

    def __init__(self, packed: PackedBase, lanes: Lanes, data: TokenizedData) -> None:
        self._packed = packed
        self._lanes = lanes
        self._data = data
        self.tokens = EVALUATION_TOKENS[packed.base.device.type]
        """Of a pass; fewer once memory has run out."""

    def split(self, adapters: Sequence[FlatAdapter | None], split: str, by_row: bool) -> list[Evaluation]:
        """The standing of each adapter on a split; None is the untrained base.

        Where memory runs out, passes have fewer rows from here on, and where they have one of each, fewer adapters.

        Args:
            by_row: keep each row's loss too.
        """
        rows = {"validation": self._data.validation, "test": self._data.test}[split]
        one_row_each = len(adapters) * int(rows.lengths_N.max())
        while True:
            try:
                return self._in_passes(adapters, rows, by_row)
            except (MemoryError, RuntimeError) as error:
                smallest = len(adapters) == 1 and self.tokens < one_row_each
                if smallest or not is_out_of_memory(error):
                    raise
            free_memory(self._packed.base.device)
            if self.tokens < one_row_each:
                half = len(adapters) // 2
                return self.split(adapters[:half], split, by_row) + self.split(adapters[half:], split, by_row)
            self.tokens //= 2
            logger.warning("out of memory in an evaluation; from now on %d tokens a pass", self.tokens)

    def _in_passes(self, adapters: Sequence[FlatAdapter | None], rows: TokenSplit, by_row: bool) -> list[Evaluation]:
        tokens = max(1, self.tokens // len(adapters))

        def measure(picked: list[int]) -> tuple[list[Measured], FlatRows]:
            batch = flatten(rows, picked)
            return self._packed.measure(self._packed.pack([Share(batch, a) for a in adapters])), batch

        groups = list(rows_by_length(rows, tokens))
        pieces = list(self._lanes.map(measure, groups))
        targets = sum(len(batch.targets_M) for _, batch in pieces)
        found = []
        for of_one in zip(*(piece for piece, _ in pieces), strict=True):
            loss, hits = sum(measured.loss for measured in of_one), sum(measured.hits for measured in of_one)
            evaluation = Evaluation(loss / targets, hits / targets, targets)
            if by_row:
                losses_N, targets_N = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
                for measured, picked, (_, batch) in zip(of_one, groups, pieces, strict=True):
                    losses_N[picked] = batch.sums_by_row(measured.losses_M.cpu().numpy())
                    targets_N[picked] = batch.targets_by_row
                evaluation = replace(evaluation, losses_N=losses_N, targets_N=targets_N)
            found.append(evaluation)
        return found
