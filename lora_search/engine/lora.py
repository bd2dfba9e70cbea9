"""The adapters of a pack behind one entrance: drop(x) A^T B^T of every trial's own rows, and the gradients.

Either products for each trial (`Apart`), or on a GPU kernels for all (`fused.Fused`).

Legend: N tokens of the pack, n those of one trial; I and O in- and out-features; R rank of a layer, S of a trial's
layers with one entrance together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from lora_search.engine.adapter import Down, FlatAdapter, Places
from lora_search.engine.fused import fused_behind, fuses
from lora_search.engine.masks import Masks
from lora_search.engine.pack import Pack, Part
from lora_search.engine.products import accumulate, product, put_product

Keeps = list[torch.Tensor | None]
"""What says where inputs are dropped; None where nothing is."""

SPARSE = 1 / 8
"""Up to which probability a CPU has the positions of what is dropped, 8 bytes each, in place of a mask of all."""


class Adapters(Protocol):
    """What the layers behind an entrance have done for them. Backwards, it keeps what the layers leave for it."""

    def adapts(self, place: int) -> bool: ...

    def enter(self, x_NI: torch.Tensor) -> tuple[list[torch.Tensor], Keeps]:
        """drop(x) A^T of all layers, for `add`; what `leave` will need."""
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

    @property
    def place(self) -> int:
        """By which its dropout is drawn."""
        first: int = next(iter(self.down.spans))
        return first

    def keep_nI(self, masks: Masks, x_nI: torch.Tensor) -> torch.Tensor:
        """The dropout mask of this pass, in bytes: to multiply with them is three times as fast as with booleans."""
        return masks.keep(self.place, tuple(x_nI.shape), x_nI.device, masks.probability).view(torch.uint8)

    def add(self, place: int, y_nO: torch.Tensor, down_nS: torch.Tensor) -> list[torch.Tensor]:
        """y += scale * drop(x) A^T B^T of one layer, of all the trial's rows or some; drop(x) A^T, if it adapts it."""
        span = self.down.spans.get(place)
        if span is None:
            return []
        down_nR = down_nS[:, span]
        y_nO.addmm_(down_nR, self.adapter.ups[place].b_RO, alpha=self.part.share.scale)
        return [down_nR]


def adapted_behind(index: int, part: Part, siblings: Places) -> Adapted | None:
    """What a part's trial has on these layers; None where it has nothing."""
    adapter = part.share.adapter
    down = None if adapter is None else adapter.down(siblings)
    return None if adapter is None or down is None else Adapted(index, part, adapter, down)


def adapters_behind(pack: Pack, siblings: Places, device: torch.device, dtype: torch.dtype, *, whole: bool) -> Adapters:
    """The adapters that the pack's trials have on these layers.

    Args:
        device: of the layers.
        dtype: of the products.
        whole: whether they read all of the pack's tokens, and not those that a router has picked.
    """
    if whole and fuses(device, dtype) and (fused := fused_behind(pack, siblings, device)) is not None:
        return fused
    adapted = [adapted_behind(index, part, siblings) for index, part in enumerate(pack.parts)]
    return Apart([one for one in adapted if one is not None], device)


class Apart:
    """A product for each trial. On a CPU its last bits depend on its own rows alone."""

    def __init__(self, adapted: Sequence[Adapted], device: torch.device) -> None:
        self._adapted = adapted
        masks = [(one, one.part.share.masks) for one in adapted]
        dropping = [(one, of_one) for one, of_one in masks if of_one is not None and of_one.probability]
        few = SPARSE if device.type == "cpu" else 0.0
        self._few = [(one, of_one) for one, of_one in dropping if of_one.probability <= few]
        """Of which positions say what is dropped."""
        self._many = [(one, of_one) for one, of_one in dropping if of_one.probability > few]
        """Of which masks say it."""
        self._grads_down_nS: dict[int, torch.Tensor] = {}

    def adapts(self, place: int) -> bool:
        return any(place in one.down.spans for one in self._adapted)

    def enter(self, x_NI: torch.Tensor) -> tuple[list[torch.Tensor], Keeps]:
        if not self._adapted:
            return [], []
        keeps = [self._positions(x_NI), *(one.keep_nI(masks, x_NI[one.rows]) for one, masks in self._many)]
        dropped_NI = self._dropped(x_NI, keeps)
        return [product(dropped_NI[one.rows], one.down.a_SI) for one in self._adapted], keeps

    def add(self, place: int, y_NO: torch.Tensor, downs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        saved: list[torch.Tensor] = []
        for one, down_nS in zip(self._adapted, downs, strict=True):
            saved += one.add(place, y_NO[one.rows], down_nS)
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
        back = [(one, self._grads_down_nS.pop(one.index)) for one in self._adapted if one.index in self._grads_down_nS]
        if not back:  # what the adapted layers make had no influence
            return
        dropped_NI = self._dropped(x_NI, keeps)
        for one, grad_down_nS in back:
            accumulate(one.down.grad_a_SI, grad_down_nS.t(), dropped_NI[one.rows])
        if grad_NI is None:
            return
        if dropped_NI is x_NI:
            for one, grad_down_nS in back:
                grad_NI[one.rows].addmm_(grad_down_nS, one.down.a_SI)
            return
        del dropped_NI
        everywhere = sum(len(grad_down_nS) for _, grad_down_nS in back) == len(grad_NI)
        through_NI = torch.empty_like(grad_NI) if everywhere else torch.zeros_like(grad_NI)
        for one, grad_down_nS in back:
            put_product(through_NI[one.rows], grad_down_nS, one.down.a_SI.t())
        grad_NI.add_(self._drop_(through_NI, keeps))

    def _positions(self, x_NI: torch.Tensor) -> torch.Tensor | None:
        """Where numbers of x are dropped, of those trials that have few of them."""
        features = x_NI.shape[-1]
        found = [
            masks.dropped(one.place, x_NI[one.rows].numel(), masks.probability) + one.rows.start * features
            for one, masks in self._few
        ]
        return torch.from_numpy(np.concatenate(found)).to(x_NI.device) if found else None

    def _dropped(self, x_NI: torch.Tensor, keeps: Keeps) -> torch.Tensor:
        return self._drop_(x_NI.clone(), keeps) if self._few or self._many else x_NI

    def _drop_(self, x_NI: torch.Tensor, keeps: Keeps) -> torch.Tensor:
        positions, *masks = keeps
        if positions is not None:
            x_NI.view(-1).index_fill_(0, positions, 0.0)
        for (one, _), keep_nI in zip(self._many, masks, strict=True):
            assert keep_nI is not None
            x_NI[one.rows].mul_(keep_nI)
        return x_NI
