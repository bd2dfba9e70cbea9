"""A base over several GPUs: what a block is given moves to the GPU that the block is on.

Ours instead of accelerate's hooks, which stand around every module, look at every argument of every call, and copy
anew for each block what all blocks are given (rotary tables, masks).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary


class Border:
    """Before a module: moves the tensors among its arguments to its device."""

    def __init__(self, device: torch.device, moved: WeakTensorKeyDictionary) -> None:
        """
        Args:
            moved: what has moved to the device already, for as long as it is there where it came from.
        """
        self._device = device
        self._moved = moved

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        moved: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(torch.Tensor, self._move, (args, kwargs))
        return moved

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self._device:
            return tensor
        if tensor.requires_grad:  # a hidden state, which one block alone is given
            return tensor.to(self._device)
        if tensor not in self._moved:
            self._moved[tensor] = tensor.to(self._device)
        there: torch.Tensor = self._moved[tensor]
        return there


def attach_borders(model: nn.Module, devices: Mapping[str, torch.device]) -> None:
    """Have each of these modules find its arguments on its device, for good.

    Args:
        devices: by the names of modules; other names (of tensors) are passed over.
    """
    moved = {device: WeakTensorKeyDictionary() for device in devices.values()}
    modules = dict(model.named_modules())
    for name, device in devices.items():
        if name in modules:
            modules[name].register_forward_pre_hook(Border(device, moved[device]), with_kwargs=True)
