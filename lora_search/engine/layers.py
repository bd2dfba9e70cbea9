"""The base's layers as a pack runs through them: the frozen product once over all trials, each adapter on its own rows.

Legend: N tokens of the pack, n of one trial; I and O in- and out-features; R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lora_search.engine.adapter import LayerAdapter
from lora_search.engine.masks import survivors_scale
from lora_search.engine.pack import Pack, Part, running
from lora_search.model import FrozenBase


@dataclass(frozen=True)
class _Adapted:
    """A trial's adapter at one layer, for one pass."""

    rows: slice
    layer: LayerAdapter
    scale: float
    """Alpha over rank, and over what dropout leaves."""
    keep_nI: torch.Tensor | None

    def dropped(self, x_nI: torch.Tensor) -> torch.Tensor:
        return x_nI if self.keep_nI is None else x_nI * self.keep_nI.view(torch.uint8)  # three times as fast as a bool


class LinearSite:
    """A frozen linear layer of the base. `attach` makes packs run through it; anybody else finds it as it was."""

    def __init__(self, place: int, module: nn.Module, base: FrozenBase) -> None:
        self.place = place
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
        given, x = x.dtype, pack.cast(x, self._working)
        adapted = [part for part in pack.parts if part.share.adapter and self.place in part.share.adapter.layers]
        out: torch.Tensor = _packed_linear(x, pack.anchor if adapted else None, self, adapted)
        return out.to(given) if x.device.type == "cpu" else out

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

    def product_NO(self, x_NI: torch.Tensor) -> torch.Tensor:
        """x W^T + b."""
        y_NO = product(x_NI, self.weight_OI())
        bias: torch.Tensor | None = self._module.bias  # type: ignore[assignment]
        return y_NO if bias is None else y_NO.add_(bias)

    def adapted(self, part: Part, x_NI: torch.Tensor) -> _Adapted:
        """A part's adapter here, with this pass's dropout mask."""
        share = part.share
        assert share.adapter is not None
        keep, scale = None, share.adapter.scaling
        if share.masks is not None and share.masks.probability > 0:
            shape = tuple(x_NI[part.tokens].shape)
            keep = share.masks.keep(self.place, shape, x_NI.device, share.masks.probability)
            scale *= survivors_scale(share.masks.probability)
        return _Adapted(part.tokens, share.adapter.layers[self.place], scale, keep)


class _PackedLinear(torch.autograd.Function):
    """y = x W^T + b, plus scale * drop(x) A^T B^T on each trial's rows; gradients go straight to the trials."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor | None, site: LinearSite, parts: Sequence[Part]
    ) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = site.product_NO(x_NI)
        adapted = [site.adapted(part, x_NI) for part in parts]
        downs = []
        for one in adapted:
            down_nR = product(one.dropped(x_NI[one.rows]), one.layer.a_RI)
            y_NO[one.rows].addmm_(down_nR, one.layer.b_OR.t(), alpha=one.scale)
            downs.append(down_nR)
        ctx.site, ctx.adapted = site, adapted
        ctx.save_for_backward(*((x_NI, *downs) if adapted else ()))
        ctx.shape = x.shape
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (grad,) = grads
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_NI = product(grad_NO, ctx.site.weight_OI().t()) if ctx.needs_input_grad[0] else None
        if not ctx.adapted:
            return None if grad_NI is None else grad_NI.view(ctx.shape), None, None, None
        x_NI, *downs = ctx.saved_tensors
        for one, down_nR in zip(ctx.adapted, downs, strict=True):
            grad_nO, layer = grad_NO[one.rows], one.layer
            grad_down_nR = product(grad_nO, layer.b_OR.t()).mul_(one.scale)
            _accumulate(layer.grad_b_OR, grad_nO.t(), down_nR, one.scale)
            _accumulate(layer.grad_a_RI, grad_down_nR.t(), one.dropped(x_NI[one.rows]), 1.0)
            if grad_NI is None:
                continue
            if one.keep_nI is None:
                grad_NI[one.rows].addmm_(grad_down_nR, layer.a_RI)
            else:
                grad_NI[one.rows].add_(product(grad_down_nR, layer.a_RI.t()).mul_(one.keep_nI.view(torch.uint8)))
        return None if grad_NI is None else grad_NI.view(ctx.shape), None, None, None


_packed_linear: Callable[..., torch.Tensor] = _PackedLinear.apply


def working_dtype(base: FrozenBase) -> torch.dtype:
    """What adapters and activations are computed in.

    On a CPU float32 even where the frozen products are bfloat16: those are four times as fast, but everything
    element by element is several times slower (analysis/benchmarks/NOTES.md).
    """
    return torch.float32 if base.device.type == "cpu" else base.compute_dtype


def product(x: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T, multiplied in the weight's dtype, in the dtype of x.

    In float32 on a CPU through oneDNN, which uses what the CPU has; MKL, torch's first choice, stops at AVX2 on CPUs
    of another maker (100 against 230 GFLOP/s on a core with AVX-512).
    """
    if weight_OI.dtype != x.dtype:
        return F.linear(x.to(weight_OI.dtype), weight_OI).to(x.dtype)
    if x.dtype == torch.float32 and x.device.type == "cpu" and _ONEDNN:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, None, "none", [], "")
        return y
    return F.linear(x, weight_OI)


_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
