"""A pack: the rows of several trials as one batch of real tokens.

Legend: T parts, N tokens of all trials, M of them targets; B sequences and T positions where a base needs padding.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_search.data import FlatRows
from lora_search.engine.adapter import FlatAdapter
from lora_search.engine.masks import Masks, survivors_scale

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """What one trial brings to a pack."""

    rows: FlatRows
    adapter: FlatAdapter | None
    """None: the untrained base."""
    masks: Masks | None = None
    """None: no dropout, as in evaluation."""
    weight: float = 0.0
    """Of each of its targets in the objective: one over the targets of the whole effective batch."""

    @property
    def dropout(self) -> float:
        """Probability of the adapter's dropout in this pass."""
        return 0.0 if self.masks is None else self.masks.probability

    @property
    def scale(self) -> float:
        """What B A x is multiplied by: alpha over rank, and over what dropout leaves; 0 without an adapter."""
        return 0.0 if self.adapter is None else self.adapter.scaling * survivors_scale(self.dropout)


@dataclass(frozen=True)
class Part:
    """Where a share stands in the pack."""

    share: Share
    tokens: slice
    targets: slice


@dataclass
class Pack:
    """Shares end to end, as tensors on a device."""

    parts: tuple[Part, ...]
    runs: tuple[tuple[int, int], ...]
    """Neighbouring sequences of one length: (sequences, tokens of each); (0, tokens) for some that are none."""
    inputs: Mapping[str, torch.Tensor]
    """What the model is called with: shapes (1, N), or (B, T) where the base needs padding."""
    flat: bool
    predictors_M: torch.Tensor
    targets_M: torch.Tensor
    weights_M: torch.Tensor
    anchor: torch.Tensor
    """A scalar that requires a gradient: what makes autograd visit a layer whose own input needs none."""
    entrance: Any = field(default=None, repr=False)
    """The `layers.Entrance` that was made last, for the layers that read the same input."""
    visits: list[tuple[torch.Tensor, int]] | None = field(default=None, repr=False)
    """Where not None, every linear layer's input and place is noted here."""
    windows: tuple[set[int], set[int]] = field(default_factory=lambda: (set(), set()), init=False, repr=False)
    """Of attention, in positions: those that the model asked masks of, and those that it told its attention."""
    tables: dict[torch.device, Any] = field(default_factory=dict, init=False, repr=False)
    """What `table.tables` has made, by device."""

    def per_part(self, values_M: torch.Tensor) -> list[float]:
        """The sum over each part's targets."""
        return torch.stack([values_M[part.targets].sum() for part in self.parts]).tolist()


def build_pack(shares: Sequence[Share], device: torch.device, multiple: int = 1) -> Pack:
    """Lay shares end to end.

    Args:
        multiple: each share has tokens up to the next multiple of this: what is added belongs to no sequence.
    """
    parts: list[Part] = []
    predictors, ids, positions = [], [], []
    runs: list[tuple[int, int]] = []
    tokens = targets = 0
    for share in shares:
        rows = share.rows
        more = np.zeros(-len(rows.tokens_N) % multiple, np.int64)
        ends = (tokens + len(rows.tokens_N) + len(more), targets + len(rows.targets_M))
        parts.append(Part(share, slice(tokens, ends[0]), slice(targets, ends[1])))
        predictors.append(rows.predictors_M + tokens)
        ids += [rows.tokens_N, more]
        positions += [rows.positions_N, more]
        runs += [*_runs(rows.lengths), *([(0, len(more))] if len(more) else [])]
        tokens, targets = ends
    inputs = {"input_ids": np.concatenate(ids)[None], "position_ids": np.concatenate(positions)[None]}
    return _pack(parts, runs, inputs, np.concatenate(predictors), device, flat=True)


def build_padded(share: Share, pad_token_id: int, device: torch.device) -> Pack:
    """One share as a padded batch, for a base that cannot keep flat sequences apart."""
    rows = share.rows
    shape = (len(rows.lengths), max(rows.lengths))
    real_BT = np.arange(shape[1]) < np.array(rows.lengths)[:, None]
    ids_BT = np.full(shape, pad_token_id, np.int64)
    ids_BT[real_BT] = rows.tokens_N
    part = Part(share, slice(0, ids_BT.size), slice(0, len(rows.targets_M)))
    predictors = np.flatnonzero(real_BT)[rows.predictors_M]
    inputs = {"input_ids": ids_BT, "attention_mask": real_BT.astype(np.int64)}
    return _pack([part], [*_runs(rows.lengths)], inputs, predictors, device, flat=False)


def _pack(
    parts: Sequence[Part],
    runs: Sequence[tuple[int, int]],
    inputs: Mapping[str, Integers],
    predictors_M: Integers,
    device: torch.device,
    *,
    flat: bool,
) -> Pack:
    def on_device(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    shares = [part.share for part in parts]
    weights = np.repeat([share.weight for share in shares], [len(share.rows.targets_M) for share in shares])
    return Pack(
        parts=tuple(parts),
        runs=tuple(runs),
        inputs={name: on_device(array) for name, array in inputs.items()},
        flat=flat,
        predictors_M=on_device(predictors_M),
        targets_M=on_device(np.concatenate([share.rows.targets_M for share in shares])),
        weights_M=on_device(weights.astype(np.float32)),
        anchor=torch.zeros((), device=device, requires_grad=True),
    )


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    for length, some in itertools.groupby(lengths):
        yield len(list(some)), length


class _Running(threading.local):
    pack: Pack | None = None


_here = _Running()
_anywhere: Pack | None = None


def running() -> Pack | None:
    """The pack that the model is being run on; None while somebody else runs it."""
    return _here.pack or _anywhere


@contextmanager
def run(pack: Pack) -> Iterator[None]:
    """Let the base's layers know the pack, through a forward pass and its backward pass.

    On a CPU each thread may run a pack of its own. On a GPU there is one for the whole process: autograd computes
    checkpointed layers again on threads of its own.
    """
    global _anywhere
    if running() is not None:
        raise RuntimeError("a pack is running already")
    if pack.anchor.device.type == "cpu":
        _here.pack = pack
    else:
        _anywhere = pack
    try:
        yield
    finally:
        _here.pack = _anywhere = None
