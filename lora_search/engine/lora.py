"""The adapters of a pack behind one entrance: drop(x) A^T B^T of every trial's own rows, and the gradients.

Either products for each trial (`Apart`), or on a GPU kernels for all (`fused.Fused`).

Legend: N tokens of the pack, n those of one trial; I and O in- and out-features; R rank of a layer, S of a trial's
layers with one entrance together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lora_search.engine.adapter import Down, FlatAdapter, Places
from lora_search.engine.fused import fused_behind, fuses
from lora_search.engine.pack import Pack, Part
from lora_search.engine.products import accumulate, product

Keeps = list[torch.Tensor | None]
"""Dropout masks; None where nothing is dropped."""


class Adapters(Protocol):
    """What the layers behind an entrance have done for them. Backwards, it keeps what the layers leave for it."""

    def adapts(self, place: int) -> bool: ...

    def enter(self, x_NI: torch.Tensor) -> tuple[list[torch.Tensor], Keeps]:
        """drop(x) A^T of all layers, for `add`; the dropout masks, for `leave`."""
        ...

    def add(self, place: int, y_NO: torch.Tensor, downs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """y += scale * drop(x) A^T B^T of one layer; what `gather` will need."""
        ...

    def gather(self, place: int, grad_NO: torch.Tensor, saved: Sequence[torch.Tensor]) -> None:
        """Add to the gradient of B of one layer, and keep that of drop(x) A^T."""
        ...

    def leave(self, x_NI: torch.Tensor, keeps: Keeps, grad_NI: torch.Tensor | None) -> None:
        """Add to the gradients of A of all layers, and to that of x where one is wanted."""
        ...


@dataclass(frozen=True)
class Adapted:
    """A trial's adapters behind one entrance, for one pass."""

    index: int
    """Of the part in the pack."""
    part: Part
    adapter: FlatAdapter
    down: Down

    @property
    def rows(self) -> slice:
        return self.part.tokens

    def keep_nI(self, x_nI: torch.Tensor) -> torch.Tensor | None:
        """The dropout mask of this pass, in bytes: to multiply with them is three times as fast as with booleans."""
        masks, dropout = self.part.share.masks, self.part.share.dropout
        if masks is None or not dropout:
            return None
        place = next(iter(self.down.spans))
        return masks.keep(place, tuple(x_nI.shape), x_nI.device, dropout).view(torch.uint8)


def adapters_behind(pack: Pack, siblings: Places, device: torch.device, dtype: torch.dtype, *, whole: bool) -> Adapters:
    """The adapters that the pack's trials have on these layers.

    Args:
        device: of the layers.
        dtype: of the products.
        whole: whether they read all of the pack's tokens, and not those that a router has picked.
    """
    if whole and fuses(device, dtype) and (fused := fused_behind(pack, siblings, device)) is not None:
        return fused
    adapted = [
        Adapted(index, part, adapter, down)
        for index, part in enumerate(pack.parts)
        if (adapter := part.share.adapter) is not None and (down := adapter.down(siblings)) is not None
    ]
    return Apart(adapted)


class Apart:
    """A product for each trial. On a CPU its last bits depend on its own rows alone."""

    def __init__(self, adapted: Sequence[Adapted]) -> None:
        self._adapted = adapted
        self._grads_down_nS: dict[int, torch.Tensor] = {}

    def adapts(self, place: int) -> bool:
        return any(place in one.down.spans for one in self._adapted)

    def enter(self, x_NI: torch.Tensor) -> tuple[list[torch.Tensor], Keeps]:
        downs: list[torch.Tensor] = []
        keeps: Keeps = []
        for one in self._adapted:
            x_nI = x_NI[one.rows]
            keeps.append(one.keep_nI(x_nI))
            downs.append(product(_dropped(x_nI, keeps[-1]), one.down.a_SI))
        return downs, keeps

    def add(self, place: int, y_NO: torch.Tensor, downs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        saved = []
        for one, down_nS in zip(self._adapted, downs, strict=True):
            if place in one.down.spans:
                down_nR = down_nS[:, one.down.spans[place]]
                y_NO[one.rows].addmm_(down_nR, one.adapter.ups[place].b_RO, alpha=one.part.share.scale)
                saved.append(down_nR)
        return saved

    def gather(self, place: int, grad_NO: torch.Tensor, saved: Sequence[torch.Tensor]) -> None:
        downs = iter(saved)
        for one in self._adapted:
            if place not in one.down.spans:
                continue
            grad_nO, down_nR, up = grad_NO[one.rows], next(downs), one.adapter.ups[place]
            accumulate(up.grad_b_RO, down_nR.t(), grad_nO, one.part.share.scale)
            grads_nS = self._grads_down_nS.get(one.index)
            if grads_nS is None:
                grads_nS = self._grads_down_nS[one.index] = grad_nO.new_zeros(len(grad_nO), len(one.down.a_SI))
            grads_nS[:, one.down.spans[place]].addmm_(grad_nO, up.b_RO.t(), beta=0, alpha=one.part.share.scale)

    def leave(self, x_NI: torch.Tensor, keeps: Keeps, grad_NI: torch.Tensor | None) -> None:
        for one, keep_nI in zip(self._adapted, keeps, strict=True):
            grad_down_nS = self._grads_down_nS.pop(one.index, None)
            if grad_down_nS is None:  # what its adapted layers make had no influence
                continue
            accumulate(one.down.grad_a_SI, grad_down_nS.t(), _dropped(x_NI[one.rows], keep_nI))
            if grad_NI is None:
                continue
            if keep_nI is None:
                grad_NI[one.rows].addmm_(grad_down_nS, one.down.a_SI)
            else:
                grad_NI[one.rows].add_(product(grad_down_nS, one.down.a_SI.t()).mul_(keep_nI))


def _dropped(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return x if keep is None else x * keep
