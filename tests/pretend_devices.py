"""Devices that this machine does not have: CPU tensors that say they are on `cpu:0`, `cpu:1`, ..., and mind it.

Every storage carries the device that it was made on. An operation on tensors of two devices is an error, as it is on
two GPUs; only a copy moves values between them. The values are computed by the same kernels as on a CPU, so that they
can be compared to the bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}


class MixedDevices(AssertionError):
    """An operation that two GPUs would refuse."""


class Devices:
    """Which pretend device each storage is on."""

    def __init__(self) -> None:
        self._of: dict[int, torch.device] = {}
        self.copies = 0
        """From one device to another."""

    def of(self, tensor: torch.Tensor) -> torch.device | None:
        return self._of.get(tensor.untyped_storage()._cdata)

    def put(self, tensor: torch.Tensor, device: torch.device) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._of:
            weakref.finalize(storage, self._of.pop, storage._cdata, None).atexit = False
        self._of[storage._cdata] = device


class _Says(TorchFunctionMode):
    """`tensor.device` is the pretend one."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return self._devices.of(args[0]) or torch.device("cpu")
        return func(*args, **(kwargs or {}))


class _Minds(TorchDispatchMode):
    """Operations stay on one device, and what they make is there."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._devices = devices

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # As on GPUs, a number in a tensor of the CPU's own may take part anywhere.
        on = {self._devices.of(t) for t in given if t.dim() > 0 or self._devices.of(t) is not None}
        wanted = kwargs.get("device")
        name = func._schema.name
        if name in COPIES:
            self.copied(on, wanted)
        elif len(on) > 1:
            raise MixedDevices(f"{name} on {sorted(map(str, on))}")
        out = func(*args, **kwargs)
        here = wanted if wanted is not None and wanted.index is not None else next(iter(on), None)
        if wanted is not None and wanted.index is None:
            here = None
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and here is not None and self._devices.of(leaf) is None:
                if not any(leaf.untyped_storage()._cdata == t.untyped_storage()._cdata for t in given):
                    self._devices.put(leaf, here)
        return out

    def copied(self, on: set[torch.device | None], wanted: torch.device | None) -> None:
        there = on | ({wanted} if wanted is not None and wanted.index is not None else set())
        self._devices.copies += len(there - {None}) > 1


@contextmanager
def pretend() -> Iterator[Devices]:
    """Within it, tensors made with `device=cpu:1` or moved there are there."""
    devices = Devices()
    with _Says(devices), _Minds(devices):
        yield devices
