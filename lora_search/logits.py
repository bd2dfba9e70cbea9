"""What an architecture makes of its output head's product: nothing, a multiple (Cohere, Granite) or a cap (Gemma 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SMALL, LARGE = -7, 17
"""Powers of 2: between such products a model shows its scale (there a tanh is a straight line) and its cap (level)."""


@dataclass(frozen=True)
class Bend:
    """Logits of the output head's product z: scale * z, or with a cap, cap * tanh(scale * z / cap).

    The cap is Gemma 2's (Gemma Team 2024, https://arxiv.org/abs/2408.00118, section 2).
    """

    scale: float = 1.0
    cap: float | None = None

    def bend_(self, product: torch.Tensor) -> torch.Tensor:
        """The logits, in the product's place."""
        if self.cap is not None:
            return product.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return product if self.scale == 1 else product.mul_(self.scale)

    def damping_(self, logits: torch.Tensor) -> torch.Tensor:
        """What a cap leaves of the gradient on its way from the logits to scale * z, in the capped logits' place."""
        if self.cap is None:
            return logits.fill_(1)
        return logits.div_(self.cap).square_().neg_().add_(1)


@torch.no_grad()
def find_bend(output_head: nn.Module, logits: Callable[[], torch.Tensor]) -> Bend | None:
    """Give a model products of our own, small and large, and look at the logits that it makes of them.

    Args:
        logits: runs the model, on few tokens; on the meta device too, since these products have values.

    Returns:
        None where it is neither a multiple nor a cap, or where the model goes past its output head.
    """
    given: list[torch.Tensor] = []

    def give(module: nn.Module, args: Any, product: torch.Tensor) -> torch.Tensor:
        device = "cpu" if product.is_meta else product.device
        sizes = torch.logspace(SMALL, LARGE, product.shape[-1] // 2 + 1, base=2.0, device=device)
        values = torch.cat([sizes, -sizes])[: product.shape[-1]]
        given.append(values.expand(product.shape).clone())
        return given[-1].clone()

    hook = output_head.register_forward_hook(give)
    try:
        bent = logits()
    finally:
        hook.remove()
    if not given or bent.shape != given[-1].shape:
        return None
    return _fitted(given[-1].double(), bent.double())


def _fitted(product: torch.Tensor, logits: torch.Tensor) -> Bend | None:
    smallest, largest = product.abs().argmin(), product.abs().argmax()
    scale = float(logits.flatten()[smallest] / product.flatten()[smallest])
    cap = float(logits.flatten()[largest].abs())
    if not 0 < scale < float("inf"):
        return None
    found = Bend(scale, None if cap > scale * 2 ** (LARGE - 1) else cap)
    return found if torch.allclose(found.bend_(product.clone()), logits, rtol=1e-5, atol=0.0) else None
