"""The adapters of a pack behind one entrance: drop(x) A^T B^T of every trial's own rows, and the gradients.

Either a product for each trial (`Apart`), or one for all (`Grouped`): on a GPU a step of small trials takes as long as
its kernels take to be launched, of which there are eight times as many for eight trials.

Legend: T parts of the pack, N its tokens, n those of one trial; I and O in- and out-features; R rank of a layer, S of a
trial's layers with one entrance together, w and W the same with room for the highest rank of all trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch.nn import functional as F

from lora_search.engine.adapter import Down, FlatAdapter, Places, Up
from lora_search.engine.pack import Pack, Part
from lora_search.engine.products import accumulate, product

EIGHT = 8
"""Ranks of a group are filled up to a multiple: a row begins at a multiple of 16 bytes, as grouped products ask for."""

GROUPED_FROM = 4
"""Trials. With fewer, what brings their matrices together is as many kernels as it saves."""

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


def adapters_behind(pack: Pack, siblings: Places, x: torch.Tensor, dtype: torch.dtype, *, whole: bool) -> Adapters:
    """The adapters that the pack's trials have on these layers.

    Args:
        x: (..., I), what the layers read.
        dtype: of the products.
        whole: whether that is all of the pack's tokens, and not those that a router has picked.
    """
    adapted = [
        Adapted(index, part, adapter, down)
        for index, part in enumerate(pack.parts)
        if (adapter := part.share.adapter) is not None and (down := adapter.down(siblings)) is not None
    ]
    if len(adapted) >= GROUPED_FROM and whole and multiplies_groups(x.device, dtype) and _fits_groups(adapted, x):
        return Grouped(adapted, pack, x.device)
    return Apart(adapted)


@cache
def multiplies_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a kernel for products of groups of rows: in bfloat16, on Hopper and Blackwell (H100 to B200).

    Elsewhere `grouped_mm` is a loop that waits for the device at every turn (pytorch/pytorch#161407, #186620).
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))


def _fits_groups(adapted: Sequence[Adapted], x: torch.Tensor) -> bool:
    """Whether every row of all matrices begins at a multiple of 16 bytes."""
    outs = [one.adapter.ups[place].b_RO.shape[1] for one in adapted for place in one.down.spans]
    return x.is_contiguous() and all(features % EIGHT == 0 for features in (x.shape[-1], *outs))


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
            grad_down_nS = self._grads_down_nS.pop(one.index)
            accumulate(one.down.grad_a_SI, grad_down_nS.t(), _dropped(x_NI[one.rows], keep_nI))
            if grad_NI is None:
                continue
            if keep_nI is None:
                grad_NI[one.rows].addmm_(grad_down_nS, one.down.a_SI)
            else:
                grad_NI[one.rows].add_(product(grad_down_nS, one.down.a_SI.t()).mul_(keep_nI))


class Grouped:
    """One product for all trials, over matrices with as many rows or columns for each as the highest rank takes.

    What a trial of a lower rank lacks is zeros, and so is all of a trial that is not adapted here.
    """

    def __init__(self, adapted: Sequence[Adapted], pack: Pack, device: torch.device) -> None:
        self._adapted = adapted
        self._groups = len(pack.parts)
        self._ends_T, self._scales_N1 = pack.groups(device)
        self._columns: dict[int, slice] = {}
        """Of W, each layer's."""
        ranks: dict[int, int] = {}
        for one in adapted:
            for place, span in one.down.spans.items():
                ranks[place] = max(ranks.get(place, 0), span.stop - span.start)
        self._width = 0
        for place, rank in ranks.items():
            start, self._width = self._width, self._width + -(-rank // EIGHT) * EIGHT
            self._columns[place] = slice(start, self._width)
        self._grad_down_NW: torch.Tensor | None = None

    def adapts(self, place: int) -> bool:
        return place in self._columns

    def enter(self, x_NI: torch.Tensor) -> tuple[list[torch.Tensor], Keeps]:
        keeps = [one.keep_nI(x_NI[one.rows]) for one in self._adapted]
        down_NW = self._product(self._dropped(x_NI, keeps), self._a_TWI(x_NI).transpose(1, 2))
        return [down_NW.mul_(self._scales_N1)], keeps

    def add(self, place: int, y_NO: torch.Tensor, downs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if place not in self._columns:
            return []
        down_Nw = downs[0][:, self._columns[place]]
        y_NO.add_(self._product(down_Nw, self._b_TwO(place, y_NO)))
        return [down_Nw]

    def gather(self, place: int, grad_NO: torch.Tensor, saved: Sequence[torch.Tensor]) -> None:
        if place not in self._columns:
            return
        (down_Nw,) = saved
        grad_NO = grad_NO.contiguous()
        grads_TwO = self._product(down_Nw.t(), grad_NO).float()  # as the totals are: many are added at once
        own, grouped = zip(*self._ups(place, grads_TwO, lambda up: up.grad_b_RO), strict=True)
        torch._foreach_add_(own, grouped)
        del grads_TwO, grouped
        if self._grad_down_NW is None:
            self._grad_down_NW = grad_NO.new_zeros(len(grad_NO), self._width)
        grad_down_Nw = self._product(grad_NO, self._b_TwO(place, grad_NO).transpose(1, 2))
        torch.mul(grad_down_Nw, self._scales_N1, out=self._grad_down_NW[:, self._columns[place]])

    def leave(self, x_NI: torch.Tensor, keeps: Keeps, grad_NI: torch.Tensor | None) -> None:
        grad_down_NW, self._grad_down_NW = self._grad_down_NW, None
        assert grad_down_NW is not None
        grads_TWI = self._product(grad_down_NW.t(), self._dropped(x_NI, keeps)).float()
        own, grouped = zip(*self._downs(grads_TWI, lambda down: down.grad_a_SI), strict=True)
        torch._foreach_add_(own, grouped)
        del grads_TWI, grouped
        if grad_NI is None:
            return
        grad_NI.add_(self._drop_(self._product(grad_down_NW, self._a_TWI(x_NI)), keeps))

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(left, right, offs=self._ends_T)

    def _dropped(self, x_NI: torch.Tensor, keeps: Keeps) -> torch.Tensor:
        """Masks are kept trial by trial: a trial without dropout takes no memory for one."""
        if all(keep is None for keep in keeps):
            return x_NI
        return self._drop_(x_NI.clone(), keeps)

    def _drop_(self, x_NI: torch.Tensor, keeps: Keeps) -> torch.Tensor:
        masks = [keep_nI for keep_nI in keeps if keep_nI is not None]
        if len(masks) == self._groups:
            return x_NI.mul_(torch.cat(masks))
        for one, keep_nI in zip(self._adapted, keeps, strict=True):
            if keep_nI is not None:
                x_NI[one.rows].mul_(keep_nI)
        return x_NI

    def _a_TWI(self, x_NI: torch.Tensor) -> torch.Tensor:
        a_TWI = x_NI.new_zeros(self._groups, self._width, x_NI.shape[-1])
        own, grouped = zip(*self._downs(a_TWI, lambda down: down.a_SI), strict=True)
        torch._foreach_copy_(grouped, own)
        return a_TWI

    def _b_TwO(self, place: int, y_NO: torch.Tensor) -> torch.Tensor:
        columns = self._columns[place]
        b_TwO = y_NO.new_zeros(self._groups, columns.stop - columns.start, y_NO.shape[-1])
        own, grouped = zip(*self._ups(place, b_TwO, lambda up: up.b_RO), strict=True)
        torch._foreach_copy_(grouped, own)
        return b_TwO

    def _downs(
        self, all_TWI: torch.Tensor, of: Callable[[Down], torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every trial's rows of each layer, its own and those among all."""
        for one in self._adapted:
            for place, span in one.down.spans.items():
                start = self._columns[place].start
                yield of(one.down)[span], all_TWI[one.index, start : start + span.stop - span.start]

    def _ups(
        self, place: int, all_TwO: torch.Tensor, of: Callable[[Up], torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every trial's rows of one layer, its own and those among all."""
        for one in self._adapted:
            if place in one.down.spans:
                own_RO = of(one.adapter.ups[place])
                yield own_RO, all_TwO[one.index, : len(own_RO)]


def _dropped(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return x if keep is None else x * keep
