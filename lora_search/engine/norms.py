"""RMSNorm as a pack runs through it on a CPU: its gradient in five passes over the numbers, where autograd takes nine.

Legend: ... leading dimensions, E features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_search.engine.pack import running
from lora_search.engine.source import source_of

LLAMAS = inspect.getsource(LlamaRMSNorm.forward)
"""Transformers writes it out anew for every architecture that has it."""


class NormSite:
    """An RMSNorm of the base. `attach` makes packs run through it; anybody else finds it as it was."""

    def __init__(self, module: nn.Module) -> None:
        self._module = cast("LlamaRMSNorm", module)
        self._alone: Callable[[torch.Tensor], torch.Tensor] = module.forward

    @staticmethod
    def is_for(module: nn.Module) -> bool:
        """Whether a module is Llama's RMSNorm, under whatever name, and computes in float32."""
        if "RMSNorm" not in type(module).__name__ or "forward" in vars(module):
            return False
        return source_of(type(module).forward) == LLAMAS and module.weight.dtype == torch.float32

    def attach(self) -> None:
        self._module.forward = self.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if running() is None or x.dtype != torch.float32:
            return self._alone(x)
        return _rms_norm(x, self._module.weight, self._module.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    """y = w x / rms(x), to the bit what Llama's is; w is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_E: torch.Tensor, epsilon: float) -> torch.Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, inverse, weight_E)
        return (x * inverse).mul_(weight_E)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """With r = 1 / rms(x) and h = w dy: dx = r h - x r^3 mean(h x)."""
        x, inverse, weight_E = ctx.saved_tensors
        grad = grads[0] * weight_E
        along = (grad * x).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return grad.mul_(inverse).addcmul_(x, along), None, None


_rms_norm: Callable[..., torch.Tensor] = _RMSNorm.apply
