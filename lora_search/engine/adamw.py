"""AdamW for many trials in one go, each with hyperparameters of its own (Loshchilov & Hutter, arXiv:1711.05101).

Every operation is one call over all trials (torch's foreach functions: on a GPU, one kernel), and element by element:
what becomes of a trial does not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@torch.no_grad()
def step_together(optimizers: Sequence[torch.optim.AdamW]) -> None:
    """Step each of these optimisers, of one group each: what each one's own `step` does, and the same state.

    Norm and clipping come before; the gradient is not touched.
    """
    by_device: dict[torch.device, _Step] = {}
    for optimizer in optimizers:
        for parameter in optimizer.param_groups[0]["params"]:
            step = by_device.setdefault(parameter.device, _Step())
            state = _state(optimizer, parameter)
            step.groups.append(optimizer.param_groups[0])
            step.parameters.append(parameter)
            step.states.append(state)
            step.roots.append(torch.empty_like(state["exp_avg_sq"]))
    for step in by_device.values():
        step.take()


@dataclass
class _Step:
    """A step of parameters that are on one device, each as its optimiser says.

    All memory that it needs is there before anything is changed: one that finds too little can be tried again.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    parameters: list[torch.Tensor] = field(default_factory=list)
    states: list[dict[str, torch.Tensor]] = field(default_factory=list)
    roots: list[torch.Tensor] = field(default_factory=list)

    def take(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        for state in self.states:
            state["step"] += 1
        steps = [int(state["step"]) for state in self.states]
        lrs = [float(group["lr"]) for group in self.groups]
        decays = [1 - lr * group["weight_decay"] for lr, group in zip(lrs, self.groups, strict=True)]
        betas1, betas2 = zip(*(group["betas"] for group in self.groups), strict=True)
        first, second = ([state[name] for state in self.states] for name in ("exp_avg", "exp_avg_sq"))

        torch._foreach_mul_(self.parameters, decays)
        torch._foreach_lerp_(first, gradients, [1 - beta for beta in betas1])
        torch._foreach_mul_(second, list(betas2))
        torch._foreach_addcmul_(second, gradients, gradients, [1 - beta for beta in betas2])
        torch._foreach_copy_(self.roots, second)
        torch._foreach_sqrt_(self.roots)
        torch._foreach_div_(self.roots, [(1 - beta**step) ** 0.5 for beta, step in zip(betas2, steps, strict=True)])
        torch._foreach_add_(self.roots, [float(group["eps"]) for group in self.groups])
        sizes = [-lr / (1 - beta**step) for lr, beta, step in zip(lrs, betas1, steps, strict=True)]
        torch._foreach_addcdiv_(self.parameters, first, self.roots, sizes)


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
    if parameter not in optimizer.state:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    return state
