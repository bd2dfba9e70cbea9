"""The layers of the base as a pack runs through them: a frozen weight is unpacked once for all trials.

Layers that read the same input (query, key and value; gate and up) have one entrance: there a trial's dropout is drawn
once and A of all these layers is one product, and there their gradients meet again.

On a CPU every product is over the rows of one trial: its last bits may depend on how many rows it has, and so a trial
on its company.

Legend: N tokens of the pack, n of one trial; I and O in- and out-features; R rank, S ranks of layers with one entrance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lora_search.engine.adapter import Down, FlatAdapter, Places
from lora_search.engine.masks import survivors_scale
from lora_search.engine.pack import Pack, Part, running
from lora_search.model import FrozenBase


@dataclass(frozen=True)
class _Adapted:
    """A trial's adapters behind one entrance, for one pass."""

    part: Part
    adapter: FlatAdapter
    down: Down

    @property
    def rows(self) -> slice:
        return self.part.tokens

    @property
    def dropout(self) -> float:
        masks = self.part.share.masks
        return 0.0 if masks is None else masks.probability

    @property
    def scale(self) -> float:
        """Alpha over rank, and over what dropout leaves."""
        return self.adapter.scaling * survivors_scale(self.dropout)

    def keep_nI(self, x_nI: torch.Tensor) -> torch.Tensor | None:
        """The dropout mask of this pass, in bytes: to multiply with them is three times as fast as with booleans."""
        if not self.dropout:
            return None
        assert self.part.share.masks is not None
        place = next(iter(self.down.spans))
        return self.part.share.masks.keep(place, tuple(x_nI.shape), x_nI.device, self.dropout).view(torch.uint8)


@dataclass
class _Meeting:
    """Where the gradients of the layers behind one entrance meet, on their way back."""

    rows: Sequence[slice]
    """Of which the frozen products are made, one at a time."""
    adapted: Sequence[_Adapted]
    wants_input: bool
    """Whether anything before the entrance needs a gradient."""
    grad_NI: torch.Tensor | None = None
    grads_down_nS: dict[int, torch.Tensor] = field(default_factory=dict)


class Entrance:
    """An input of the pack, on its way into the layers that read it."""

    def __init__(self, pack: Pack, x: torch.Tensor, siblings: Places, dtype: torch.dtype) -> None:
        """
        Args:
            x: (..., I); its leading dimensions hold the pack's tokens, or those that a router has picked.
            siblings: the layers that will read it.
            dtype: of the products.
        """
        self.input = x
        self.siblings = siblings
        tokens = x.numel() // x.shape[-1]
        by_part = x.device.type == "cpu" and tokens == pack.parts[-1].tokens.stop
        adapted = [
            _Adapted(part, part.share.adapter, down)
            for part in pack.parts
            if part.share.adapter is not None and (down := part.share.adapter.down(siblings)) is not None
        ]
        self.meeting = _Meeting(
            [part.tokens for part in pack.parts] if by_part else [slice(0, tokens)], adapted, x.requires_grad
        )
        self.x_NI: torch.Tensor
        self.downs_nS: list[torch.Tensor]
        self.token = _enter(x, pack.anchor if adapted else None, self, dtype)
        """What autograd sees of the input from here on: a scalar, by which all its gradients come back."""

    def token_of(self, place: int) -> torch.Tensor | None:
        """The token, for a layer that a gradient passes through or ends in."""
        ends_here = any(place in one.down.spans for one in self.meeting.adapted)
        return self.token if ends_here or self.meeting.wants_input else None


class LinearSite:
    """A frozen linear layer of the base. `attach` makes packs run through it; anybody else finds it as it was."""

    def __init__(self, place: int, module: nn.Module, base: FrozenBase) -> None:
        self.place = place
        self.siblings: Places = (place,)
        """The layers that read the same input one after the other; an entrance is made for all of them by the first."""
        self._module = module
        self._dtype = base.compute_dtype
        self._working = working_dtype(base)
        self._alone: Callable[[torch.Tensor], torch.Tensor] = module.forward

    def attach(self) -> None:
        self._module.forward = self.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pack = running()
        if pack is None:
            return self._alone(x)
        entrance = self._entrance(pack, x)
        out = _packed_linear(entrance.token_of(self.place), self, entrance).view(*x.shape[:-1], -1)
        return out.to(x.dtype) if x.device.type == "cpu" else out

    def _entrance(self, pack: Pack, x: torch.Tensor) -> Entrance:
        if pack.visits is not None:
            pack.visits.append((x, self.place))
        last: Entrance | None = pack.entrance
        if last is None or last.input is not x or self.place not in last.siblings:
            first = self.place == self.siblings[0]
            last = pack.entrance = Entrance(pack, x, self.siblings if first else (self.place,), self._working)
        return last

    def weight_OI(self) -> torch.Tensor:
        """The frozen weight in the dtype of the products, de-quantised straight into it as bitsandbytes does."""
        weight: torch.Tensor = self._module.weight  # type: ignore[assignment]
        state = getattr(weight, "quant_state", None)
        if state is None:
            return (weight.t() if _stands_transposed(self._module) else weight).to(self._dtype)
        from bitsandbytes import functional

        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        dense: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            weight.data, absmax, state.blocksize, state.quant_type, state.shape, self._dtype
        )
        return dense

    def product_NO(self, x_NI: torch.Tensor, rows: Sequence[slice]) -> torch.Tensor:
        """x W^T + b."""
        y_NO = product_of_rows(x_NI, self.weight_OI(), rows)
        bias: torch.Tensor | None = self._module.bias  # type: ignore[assignment]
        return y_NO if bias is None else y_NO.add_(bias)


class _Enter(torch.autograd.Function):
    """drop(x) A^T of every trial, for all layers behind an entrance; backwards, the gradients of A and of x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor | None, entrance: Entrance, dtype: torch.dtype
    ) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        entrance.x_NI, entrance.downs_nS = x_NI, []
        ctx.meeting, ctx.shape, ctx.dtype = entrance.meeting, x.shape, x.dtype
        keeps = []
        for one in entrance.meeting.adapted:
            x_nI = x_NI[one.rows]
            keeps.append(one.keep_nI(x_nI))
            entrance.downs_nS.append(product(_dropped(x_nI, keeps[-1]), one.down.a_SI))
        ctx.save_for_backward(*((x_NI, *keeps) if keeps else ()))
        ctx.set_materialize_grads(False)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None, None]:
        meeting: _Meeting = ctx.meeting
        grad_NI, meeting.grad_NI = meeting.grad_NI, None
        x_NI, *keeps = ctx.saved_tensors or (torch.empty(0),)
        for index, (one, keep_nI) in enumerate(zip(meeting.adapted, keeps, strict=True)):
            grad_down_nS = meeting.grads_down_nS.pop(index)
            _accumulate(one.down.grad_a_SI, grad_down_nS.t(), _dropped(x_NI[one.rows], keep_nI), 1.0)
            if grad_NI is None:
                continue
            if keep_nI is None:
                grad_NI[one.rows].addmm_(grad_down_nS, one.down.a_SI)
            else:
                grad_NI[one.rows].add_(product(grad_down_nS, one.down.a_SI.t()).mul_(keep_nI))
        return None if grad_NI is None else grad_NI.view(ctx.shape).to(ctx.dtype), None, None, None


_enter: Callable[..., torch.Tensor] = _Enter.apply


class _PackedLinear(torch.autograd.Function):
    """y = x W^T + b, plus scale * drop(x) A^T B^T on each trial's rows; gradients go straight to the trials."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor | None, site: LinearSite, entrance: Entrance) -> torch.Tensor:
        meeting = entrance.meeting
        y_NO = site.product_NO(entrance.x_NI, meeting.rows)
        downs = []
        for one, down_nS in zip(meeting.adapted, entrance.downs_nS, strict=True):
            if site.place in one.down.spans:
                down_nR = down_nS[:, one.down.spans[site.place]]
                y_NO[one.rows].addmm_(down_nR, one.adapter.ups[site.place].b_OR.t(), alpha=one.scale)
                downs.append(down_nR)
        ctx.site, ctx.meeting = site, meeting
        ctx.save_for_backward(*downs)
        return y_NO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        (grad_NO,) = grads
        site: LinearSite = ctx.site
        meeting: _Meeting = ctx.meeting
        if meeting.wants_input:
            weight_IO = site.weight_OI().t()
            if meeting.grad_NI is None:
                meeting.grad_NI = product_of_rows(grad_NO, weight_IO, meeting.rows)
            else:
                add_product_of_rows(meeting.grad_NI, grad_NO, weight_IO, meeting.rows)
        downs = iter(ctx.saved_tensors)
        for index, one in enumerate(meeting.adapted):
            if site.place not in one.down.spans:
                continue
            grad_nO, down_nR, up = grad_NO[one.rows], next(downs), one.adapter.ups[site.place]
            _accumulate(up.grad_b_OR, grad_nO.t(), down_nR, one.scale)
            grads_nS = meeting.grads_down_nS.get(index)
            if grads_nS is None:
                grads_nS = meeting.grads_down_nS[index] = grad_nO.new_zeros(len(grad_nO), len(one.down.a_SI))
            grads_nS[:, one.down.spans[site.place]].addmm_(grad_nO, up.b_OR, beta=0, alpha=one.scale)
        return None, None, None


_packed_linear: Callable[..., torch.Tensor] = _PackedLinear.apply


def _dropped(x_nI: torch.Tensor, keep_nI: torch.Tensor | None) -> torch.Tensor:
    return x_nI if keep_nI is None else x_nI * keep_nI


def working_dtype(base: FrozenBase) -> torch.dtype:
    """What adapters and activations are computed in.

    On a CPU float32 even where the frozen products are bfloat16: those are four times as fast, but everything
    element by element is several times slower (analysis/benchmarks/NOTES.md).
    """
    return torch.float32 if base.device.type == "cpu" else base.compute_dtype


def product(x: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T, multiplied in the weight's dtype, in the dtype of x.

    In float32 on a CPU with AVX-512 through oneDNN, which uses it; MKL, torch's first choice, stops at AVX2 on CPUs of
    another maker (100 against 230 GFLOP/s a core). Elsewhere MKL is a little faster, and keeps no kernel for every
    number of tokens it has seen.
    """
    if weight_OI.dtype != x.dtype:
        return F.linear(x.to(weight_OI.dtype), weight_OI).to(x.dtype)
    if x.dtype == torch.float32 and x.device.type == "cpu" and _ONEDNN:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, None, "none", [], "")
        return y
    return F.linear(x, weight_OI)


def product_of_rows(x_NI: torch.Tensor, weight_OI: torch.Tensor, rows: Sequence[slice]) -> torch.Tensor:
    """x W^T, a product for each stretch of rows."""
    if len(rows) == 1:
        return product(x_NI, weight_OI)
    if _ONEDNN or weight_OI.dtype != x_NI.dtype:
        return torch.cat([product(x_NI[some], weight_OI) for some in rows])
    y_NO = x_NI.new_empty(len(x_NI), len(weight_OI))
    for some in rows:
        torch.mm(x_NI[some], weight_OI.t(), out=y_NO[some])
    return y_NO


def add_product_of_rows(
    total_NO: torch.Tensor, x_NI: torch.Tensor, weight_OI: torch.Tensor, rows: Sequence[slice]
) -> None:
    """total += x W^T, a product for each stretch of rows."""
    for some in rows:
        if _ONEDNN or weight_OI.dtype != x_NI.dtype:
            total_NO[some] += product(x_NI[some], weight_OI)
        else:
            total_NO[some].addmm_(x_NI[some], weight_OI.t())


_ONEDNN = bool(
    torch.cpu.get_capabilities().get("avx512_f")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """total += scale * left @ right, the sum kept in float32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)


class AdapterPassage:
    """PEFT's wrapper around a linear layer: under a pack, the layer inside has done the adapter's work already."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._alone: Callable[..., torch.Tensor] = module.forward

    @classmethod
    def attach(cls, module: nn.Module) -> None:
        """Once for each wrapper, however many adapters it comes to hold."""
        if "forward" not in vars(module):
            module.forward = cls(module).forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if running() is None:
            return self._alone(x, *args, **kwargs)
        out: torch.Tensor = self._module.base_layer(x)  # type: ignore[operator]
        return out


class DropoutSite:
    """A dropout of the base's own (GPT-2 has them): under a pack, each trial's rows have a mask of the trial's."""

    def __init__(self, place: int, module: nn.Dropout) -> None:
        self._place = place
        self._module = module
        self._alone: Callable[[torch.Tensor], torch.Tensor] = module.forward

    def attach(self) -> None:
        self._module.forward = self.forward  # type: ignore[method-assign, assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pack = running()
        if pack is None:
            return self._alone(x)
        if not self._module.training:
            return x
        return x * self._mask(pack, x)

    def _mask(self, pack: Pack, x: torch.Tensor) -> torch.Tensor:
        mask_NI = x.new_ones(x.numel() // x.shape[-1], x.shape[-1])
        probability = self._module.p
        for part in pack.parts:
            if part.share.masks is not None:
                rows = mask_NI[part.tokens]
                keep = part.share.masks.keep(self._place, tuple(rows.shape), x.device, probability)
                rows.copy_(keep).mul_(survivors_scale(probability))
        return mask_NI.view(x.shape)


def _stands_transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight as in x out."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
