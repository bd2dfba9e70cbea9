"""AdamW for many trials in one go, each with hyperparameters of its own (Loshchilov & Hutter, arXiv:1711.05101).

Every operation is one call over all trials (torch's foreach functions: on a GPU, one kernel), and element by element:
what becomes of a trial does not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def step_together(optimizers: Sequence[torch.optim.AdamW]) -> None:
    """Step each of these optimisers, of one group each: what each one's own `step` does, and the same state.

    Norm and clipping come before; the gradient is not touched.
    """
    by_device: dict[torch.device, list[tuple[torch.optim.AdamW, torch.Tensor]]] = {}
    for optimizer in optimizers:
        for parameter in optimizer.param_groups[0]["params"]:
            by_device.setdefault(parameter.device, []).append((optimizer, parameter))
    for there in by_device.values():
        _step([optimizer for optimizer, _ in there], [parameter for _, parameter in there])


def _step(optimizers: Sequence[torch.optim.AdamW], parameters: list[torch.Tensor]) -> None:
    """Step these parameters, which are on one device, each as its optimiser says."""
    groups: list[dict[str, Any]] = [optimizer.param_groups[0] for optimizer in optimizers]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    states = [_state(optimizer, p) for optimizer, p in zip(optimizers, parameters, strict=True)]
    for state in states:
        state["step"] += 1
    steps = [int(state["step"]) for state in states]
    lrs = [float(group["lr"]) for group in groups]
    betas1, betas2 = zip(*(group["betas"] for group in groups), strict=True)
    first, second = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))

    torch._foreach_mul_(parameters, [1 - lr * group["weight_decay"] for lr, group in zip(lrs, groups, strict=True)])
    torch._foreach_lerp_(first, gradients, [1 - beta for beta in betas1])
    torch._foreach_mul_(second, list(betas2))
    torch._foreach_addcmul_(second, gradients, gradients, [1 - beta for beta in betas2])
    roots = torch._foreach_sqrt(second)
    torch._foreach_div_(roots, [(1 - beta**step) ** 0.5 for beta, step in zip(betas2, steps, strict=True)])
    torch._foreach_add_(roots, [float(group["eps"]) for group in groups])
    sizes = [-lr / (1 - beta**step) for lr, beta, step in zip(lrs, betas1, steps, strict=True)]
    torch._foreach_addcdiv_(parameters, first, roots, sizes)


def norms_together(gradients: Sequence[Sequence[torch.Tensor]]) -> list[float]:
    """The L2 norm of each trial's gradient, which is in one piece on each device that it is on."""
    norms: list[list[float]] = [[] for _ in gradients]
    by_device: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    for index, pieces in enumerate(gradients):
        for piece in pieces:
            by_device.setdefault(piece.device, []).append((index, piece))
    for there in by_device.values():
        found = torch.stack(torch._foreach_norm([piece for _, piece in there])).tolist()
        for (index, _), norm in zip(there, found, strict=True):
            norms[index].append(norm)
    return [math.hypot(*pieces) for pieces in norms]  # of one piece, its own norm to the bit


def clip_together(gradients: Sequence[Sequence[torch.Tensor]], norms: Sequence[float], limits: Sequence[float]) -> None:
    """Scale each gradient whose norm is above its limit down to it, as torch.nn.utils.clip_grad_norm_; 0: no limit."""
    clipped = [
        (piece, limit / (norm + 1e-6))
        for pieces, norm, limit in zip(gradients, norms, limits, strict=True)
        if limit and norm > limit
        for piece in pieces
    ]
    if clipped:
        torch._foreach_mul_([piece for piece, _ in clipped], [scale for _, scale in clipped])


def _state(optimizer: torch.optim.AdamW, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state
