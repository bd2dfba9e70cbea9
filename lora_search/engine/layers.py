"""The layers of the base as a pack runs through them: a frozen weight is unpacked once for all trials.

Layers that read the same input (query, key and value; gate and up) have one entrance: there a trial's dropout is drawn
once and A of all these layers is one product, and there their gradients meet again.

On a CPU every product is over the rows of one trial: its last bits may depend on how many rows it has, and so a trial
on its company.

Legend: N tokens of the pack; I and O in- and out-features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_search.engine.adapter import Places
from lora_search.engine.lora import Adapters, adapters_behind
from lora_search.engine.masks import survivors_scale
from lora_search.engine.pack import Pack, running
from lora_search.engine.products import add_product_of_rows, product_of_rows, working_dtype
from lora_search.model import FrozenBase


@dataclass
class _Meeting:
    """Where the gradients of the layers behind one entrance meet, on their way back."""

    rows: Sequence[slice]
    """Of which products are made, one at a time."""
    adapters: Adapters
    wants_input: bool
    """Whether anything before the entrance needs a gradient."""
    grad_NI: torch.Tensor | None = None


class Entrance:
    """An input of the pack, on its way into the layers that read it."""

    def __init__(self, pack: Pack, x: torch.Tensor, siblings: Places, working: torch.dtype) -> None:
        """
        Args:
            x: (..., I); its leading dimensions hold the pack's tokens, or those that a router has picked.
            siblings: the layers that will read it.
            working: dtype of the adapters' products.
        """
        self.input = x
        self.siblings = siblings
        tokens = x.numel() // x.shape[-1]
        whole = tokens == pack.parts[-1].tokens.stop
        by_part = whole and x.device.type == "cpu"
        rows = [part.tokens for part in pack.parts] if by_part else [slice(0, tokens)]
        self.meeting = _Meeting(rows, adapters_behind(pack, siblings, x.device, working, whole=whole), x.requires_grad)
        self.x_NI: torch.Tensor
        self.downs: list[torch.Tensor]
        self._frozen_NI: torch.Tensor | None = None
        ends_here = any(map(self.meeting.adapters.adapts, siblings))
        self.token = _enter(x, pack.anchor if ends_here else None, self, working)
        """What autograd sees of the input from here on: a scalar, by which all its gradients come back."""

    def frozen_NI(self, dtype: torch.dtype) -> torch.Tensor:
        """The input in the dtype of the frozen products."""
        if self._frozen_NI is None:
            self._frozen_NI = self.x_NI.to(dtype)
        return self._frozen_NI

    def token_of(self, place: int) -> torch.Tensor | None:
        """The token, for a layer that a gradient passes through or ends in."""
        return self.token if self.meeting.adapters.adapts(place) or self.meeting.wants_input else None


class LinearSite:
    """A frozen linear layer of the base. `attach` makes packs run through it; anybody else finds it as it was."""

    def __init__(self, place: int, module: nn.Module, base: FrozenBase) -> None:
        self.place = place
        self.siblings: Places = (place,)
        """The layers that read the same input one after the other; an entrance is made for all of them by the first."""
        self._module = module
        self.dtype = base.compute_dtype
        self._working = working_dtype(base)
        self._alone: Callable[[torch.Tensor], torch.Tensor] = module.forward
        self.keeps_dense = False
        """Whether the de-quantised weight stays, once there."""
        self._dense_OI: torch.Tensor | None = None

    def attach(self) -> None:
        self._module.forward = self.forward

    @property
    def dense_bytes(self) -> int:
        """Of the weight, once de-quantised; 0 where it is not quantised."""
        state = getattr(self._module.weight, "quant_state", None)
        return 0 if state is None else state.shape.numel() * self.dtype.itemsize

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
        """The frozen weight in the dtype of the products."""
        if self._dense_OI is not None:
            return self._dense_OI
        dense_OI = self._dequantised()
        if self.keeps_dense:
            self._dense_OI = dense_OI
        return dense_OI

    def _dequantised(self) -> torch.Tensor:
        """Straight into that dtype, as bitsandbytes does."""
        weight: torch.Tensor = self._module.weight  # type: ignore[assignment]
        state = getattr(weight, "quant_state", None)
        if state is None:
            return (weight.t() if _stands_transposed(self._module) else weight).to(self.dtype)
        from bitsandbytes import functional

        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        dense: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            weight.data, absmax, state.blocksize, state.quant_type, state.shape, self.dtype
        )
        return dense

    def product_NO(self, x_NI: torch.Tensor, rows: Sequence[slice]) -> torch.Tensor:
        """x W^T of each stretch of rows, x in the dtype of the products."""
        return product_of_rows(x_NI, self.weight_OI(), rows)

    def whole_NO(self, y_NO: torch.Tensor) -> torch.Tensor:
        """Such a product, or some of its rows, in the dtype of the adapters' and with the bias."""
        y_NO = y_NO.to(self._working)
        bias: torch.Tensor | None = self._module.bias  # type: ignore[assignment]
        return y_NO if bias is None else y_NO.add_(bias)


class _Enter(torch.autograd.Function):
    """drop(x) A^T of every trial, for all layers behind an entrance; backwards, the gradients of A and of x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor | None, entrance: Entrance, dtype: torch.dtype
    ) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
        entrance.x_NI = x_NI
        entrance.downs, keeps = entrance.meeting.adapters.enter(x_NI)
        ctx.meeting, ctx.shape, ctx.dtype = entrance.meeting, x.shape, x.dtype
        ctx.save_for_backward(*((x_NI, *keeps) if keeps else ()))
        ctx.set_materialize_grads(False)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None, None]:
        meeting: _Meeting = ctx.meeting
        grad_NI, meeting.grad_NI = meeting.grad_NI, None
        if saved := ctx.saved_tensors:  # looked at once: what is computed again for it is given once
            x_NI, *keeps = saved
            meeting.adapters.leave(x_NI, keeps, grad_NI)
        return None if grad_NI is None else grad_NI.view(ctx.shape).to(ctx.dtype), None, None, None


_enter: Callable[..., torch.Tensor] = _Enter.apply


class _PackedLinear(torch.autograd.Function):
    """y = x W^T + b, plus scale * drop(x) A^T B^T on each trial's rows; gradients go straight to the trials."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor | None, site: LinearSite, entrance: Entrance) -> torch.Tensor:
        meeting = entrance.meeting
        y_NO = site.whole_NO(site.product_NO(entrance.frozen_NI(site.dtype), meeting.rows))
        ctx.site, ctx.meeting = site, meeting
        ctx.save_for_backward(*meeting.adapters.add(site.place, y_NO, entrance.downs))
        return y_NO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        (grad_NO,) = grads
        site: LinearSite = ctx.site
        meeting: _Meeting = ctx.meeting
        if meeting.wants_input:
            weight_IO = site.weight_OI().t()
            if meeting.grad_NI is None:
                grad_NI = product_of_rows(grad_NO.to(weight_IO.dtype), weight_IO, meeting.rows)
                meeting.grad_NI = grad_NI.to(grad_NO.dtype)
            else:
                add_product_of_rows(meeting.grad_NI, grad_NO, weight_IO, meeting.rows)
        meeting.adapters.gather(site.place, grad_NO, list(ctx.saved_tensors))
        return None, None, None


_packed_linear: Callable[..., torch.Tensor] = _PackedLinear.apply


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
                rows = mask_NI[part.tokens] if pack.flat else mask_NI  # attention's weights have more rows than tokens
                keep = part.share.masks.keep(self._place, tuple(rows.shape), x.device, probability)
                rows.copy_(keep).mul_(survivors_scale(probability))
        return mask_NI.view(x.shape)


def _stands_transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight as in x out."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
