"""AdamW for many trials in one go, each with hyperparameters of its own (Loshchilov & Hutter, arXiv:1711.05101).

Every operation is one call over all trials (torch's foreach functions: on a GPU, one kernel), and element by element:
what becomes of a trial does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def step_together(optimizers: Sequence[torch.optim.AdamW]) -> None:
    """Step each of these optimisers, of one parameter each: what each one's own `step` does, and the same state.

    Norm and clipping come before; the gradient is not touched.
    """
    if not optimizers:
        return
    groups: list[dict[str, Any]] = [optimizer.param_groups[0] for optimizer in optimizers]
    parameters: list[torch.Tensor] = [group["params"][0] for group in groups]
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


def clip_together(gradients: Sequence[torch.Tensor], norms: Sequence[float], limits: Sequence[float]) -> None:
    """Scale each gradient whose norm is above its limit down to it, as torch.nn.utils.clip_grad_norm_; 0: no limit."""
    clipped = [
        (gradient, limit / (norm + 1e-6))
        for gradient, norm, limit in zip(gradients, norms, limits, strict=True)
        if limit and norm > limit
    ]
    if clipped:
        torch._foreach_mul_([gradient for gradient, _ in clipped], [scale for _, scale in clipped])


def _state(optimizer: torch.optim.AdamW, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state
