"""Rotary position embeddings as a pack runs through them: on a CPU in three operations where autograd takes six.

And of no pass do they keep anything for the next, as dynamic NTK does with the longest row so far.

Legend: H heads, N tokens of the pack, D features of a head.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from lora_search.engine.pack import running
from lora_search.engine.source import source_of

NAME = "apply_rotary_pos_emb"

LLAMAS = tuple(map(source_of, (modeling_llama.apply_rotary_pos_emb, modeling_llama.rotate_half)))
"""Transformers writes both out anew for every architecture that has them; NanoChat's and BLT's halves turn back."""

Rotated = tuple[torch.Tensor, torch.Tensor]


def attach_rotary(model: PreTrainedModel) -> None:
    """Have packs rotate queries and keys by ours where an architecture's code does it as Llama's; others as before."""
    for name in {type(module).__module__ for module in model.modules()}:
        code = sys.modules.get(name)
        function = getattr(code, NAME, None)
        written = tuple(map(source_of, (function, getattr(code, "rotate_half", None))))
        if None not in LLAMAS and inspect.isfunction(function) and written == LLAMAS:
            setattr(code, NAME, _packed(function))


def forget_longest(model: PreTrainedModel) -> None:
    """Have packs find a base's dynamic NTK as it was at first.

    Transformers has it grow with the longest row so far, until a pass is short enough to begin anew
    (`dynamic_rope_update` in its modeling_rope_utils.py): a trial's positions would be turned by what ran before.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if any("dynamic" in str(kind) for kind in (kinds.values() if isinstance(kinds, dict) else (kinds,))):
            module.register_forward_pre_hook(_begin_anew)


def _begin_anew(module: Any, given: object) -> None:
    if running() is None:
        return
    for name in [name for name, _ in module.named_buffers() if name.endswith("original_inv_freq")]:
        prefix = name.removesuffix("original_inv_freq")
        setattr(module, f"{prefix}inv_freq", getattr(module, name))
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _packed(alone: Callable[..., Rotated]) -> Callable[..., Rotated]:
    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> Rotated:
        if running() is None or q.device.type != "cpu" or q.dtype != torch.float32:
            return alone(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    return rotate


class _Rotate(torch.autograd.Function):
    """x cos + (-x2, x1) sin, of x = (x1, x2) of shape (1, H, N, D); what it needs for its gradient it is given."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        out = grad * cos
        out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return out, None, None


_rotate: Callable[..., torch.Tensor] = _Rotate.apply
