"""Batches: which rows a trial's step reads, and how rows stand in one tensor.

Legend: B sequences, T positions of the longest; N tokens of all rows, M of them targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from lora_search.data.tokens import TokenSplit


@dataclass(frozen=True)
class Batch:
    """Sequences padded at their ends to the longest of them."""

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    trained_BT: torch.Tensor
    """True where the token counts in the loss, as the target of the position before it."""
    tokens: int
    """Real tokens, padding not counted."""
    targets: int
    """Tokens that the loss counts."""

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        ids, attention, trained = (
            t.to(device, non_blocking=True) for t in (self.input_ids_BT, self.attention_mask_BT, self.trained_BT)
        )
        return Batch(ids, attention, trained, self.tokens, self.targets)


def training_rows(rows: int, seed: int, start: int, count: int) -> list[int]:
    """The `count` row numbers from position `start` on, in the endless order that belongs to a seed.

    Each epoch is a permutation of its own; a batch may reach from one epoch into the next, so that every batch is
    full. The order is a function of its arguments: nothing to save but the position.
    """
    picked: list[int] = []
    while len(picked) < count:
        epoch, offset = divmod(start + len(picked), rows)
        picked += _epoch_order(rows, seed, epoch)[offset : offset + count - len(picked)].tolist()
    return picked


@lru_cache(maxsize=16)
def _epoch_order(rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def collate(split: TokenSplit, rows: Sequence[int], pad_token_id: int) -> Batch:
    """The named rows as one batch."""
    pieces = [split.row(row) for row in rows]
    longest = max(len(tokens) for tokens, _ in pieces)
    shape = (len(pieces), longest)
    ids_BT = np.full(shape, pad_token_id, np.int64)
    attention_BT = np.zeros(shape, np.int64)
    trained_BT = np.zeros(shape, np.bool_)
    for index, (tokens, trained) in enumerate(pieces):
        ids_BT[index, : len(tokens)] = tokens
        attention_BT[index, : len(tokens)] = 1
        trained_BT[index, : len(tokens)] = trained
    trained_BT[:, 0] = False  # predicted from nothing
    return Batch(
        torch.from_numpy(ids_BT),
        torch.from_numpy(attention_BT),
        torch.from_numpy(trained_BT),
        tokens=int(attention_BT.sum()),
        targets=int(trained_BT.sum()),
    )


@dataclass(frozen=True)
class FlatRows:
    """Rows end to end, without padding."""

    tokens_N: npt.NDArray[np.int64]
    positions_N: npt.NDArray[np.int64]
    """Each token's place in its own row."""
    lengths: tuple[int, ...]
    """Of the rows, in order."""
    predictors_M: npt.NDArray[np.int64]
    """Where, among the N, the token before each target stands."""
    targets_M: npt.NDArray[np.int64]

    @property
    def targets_by_row(self) -> npt.NDArray[np.int64]:
        """Targets of each row."""
        return np.bincount(self._row_of_target_M, minlength=len(self.lengths))

    def sums_by_row(self, values_M: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """The sum over each row's targets."""
        return np.bincount(self._row_of_target_M, values_M, minlength=len(self.lengths)).astype(np.float64)

    @property
    def _row_of_target_M(self) -> npt.NDArray[np.int64]:
        return np.searchsorted(np.cumsum(self.lengths), self.predictors_M, side="right")


def flatten(split: TokenSplit, rows: Sequence[int]) -> FlatRows:
    """The named rows end to end."""
    pieces = [split.row(row) for row in rows]
    lengths = tuple(len(tokens) for tokens, _ in pieces)
    tokens_N = np.concatenate([tokens for tokens, _ in pieces]).astype(np.int64)
    trained_N = np.concatenate([trained for _, trained in pieces])
    starts = np.cumsum((0, *lengths[:-1]))
    trained_N[starts] = False  # predicted from nothing
    chosen_M = np.flatnonzero(trained_N)
    positions_N = np.arange(len(tokens_N)) - np.repeat(starts, lengths)
    return FlatRows(tokens_N, positions_N, lengths, chosen_M - 1, tokens_N[chosen_M])


def rows_by_length(split: TokenSplit, max_tokens: int) -> Iterator[list[int]]:
    """All rows of a split once, in groups of like length and at most `max_tokens` tokens (but at least one row)."""
    lengths = split.lengths_N
    picked: list[int] = []
    tokens = 0
    for row in np.argsort(lengths, kind="stable").tolist():
        if picked and tokens + int(lengths[row]) > max_tokens:
            yield picked
            picked, tokens = [], 0
        picked.append(row)
        tokens += int(lengths[row])
    if picked:
        yield picked


def evaluation_batches(split: TokenSplit, pad_token_id: int, max_tokens: int) -> Iterator[Batch]:
    """All rows of a split once, rows of like length together, each batch at most `max_tokens` with its padding."""
    order = np.argsort(split.lengths_N, kind="stable")
    picked: list[int] = []
    for row in order.tolist():
        if picked and (len(picked) + 1) * int(split.lengths_N[row]) > max_tokens:
            yield collate(split, picked, pad_token_id)
            picked = []
        picked.append(row)
    if picked:
        yield collate(split, picked, pad_token_id)
