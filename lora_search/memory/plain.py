"""What a training step of PEFT alone holds, as everybody knows it: one adapter, padded rows, logits of all positions.

Not how we train: it explains figures that others have published, and what our engine does differently.

Legend: B rows, H heads, T positions, D features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from lora_search.memory.live import LiveBytes
from lora_search.memory.mirror import sdpa

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lora_search_plain"


@dataclass(frozen=True)
class PlainStep:
    """Bytes of a step of PEFT alone."""

    weights: int
    trainable: int
    """Parameters, not bytes."""
    state: int
    """Float32 adapter, gradients and Adam's moments."""
    logits: int
    """One tensor of logits of all positions, in the base's dtype: there until the next step's takes its place."""
    peak: int
    """The most at once, all of the above in it."""

    @property
    def between(self) -> int:
        """Bytes that are allocated when a step is over."""
        return self.weights + self.state + self.logits


def plain_step(
    model: PreTrainedModel, modules: Sequence[str], rank: int, rows: int, length: int, dtype: torch.dtype
) -> PlainStep:
    """A step of PEFT on a base in half precision, without gradient checkpointing.

    Args:
        model: a skeleton; it is changed for good.
        modules: names as in PEFT's `target_modules`.
    """
    from peft import LoraConfig, get_peft_model

    model = model.to(dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    model.config._attn_implementation_internal = NAME
    peft = get_peft_model(model, LoraConfig(r=rank, target_modules=list(modules), task_type="CAUSAL_LM"))
    adapters = [p for p in peft.parameters() if p.requires_grad]
    size = sum(p.numel() for p in adapters)
    ids = torch.zeros((rows, length), dtype=torch.int64, device="meta")
    with LiveBytes([*peft.parameters(), *peft.buffers()]) as live:
        out = peft(input_ids=ids, attention_mask=ids, labels=ids, use_cache=False)
        logits = out.logits.numel() * out.logits.element_size()
        torch.autograd.backward(out.loss)
    state = 16 * size  # the gradients are among what was live as well, and were not there in the first half of it
    return PlainStep(weights, size, state, logits, weights + 12 * size + live.peak)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return sdpa(query, key, value).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _no_mask)
