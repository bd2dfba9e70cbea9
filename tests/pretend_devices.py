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


class MixedDevices(Exception):
    """An operation that two GPUs would refuse. The engine's probes of what an architecture can do do not catch it."""


ANYWHERE = torch.device("meta")
"""Of zeros that autograd's own code has made: on a GPU they are where the tensor is that they are made for."""


class Devices:
    """Which pretend device each storage is on."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        """The functions of torch that Python code is in, the innermost last."""
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
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return self._devices.of(args[0]) or torch.device("cpu")
        if func is torch.Tensor.to and isinstance(args[-1], torch.device):
            source = self._devices.of(args[0])
            if source not in (None, args[-1]) and args[0].requires_grad and torch.is_grad_enabled():
                return _Moved.apply(args[0], args[-1], source)
        self._devices.calls.append(func)
        try:
            if func is torch.autograd.backward:
                return self._backward(*args[0])
            return func(*args, **(kwargs or {}))
        finally:
            self._devices.calls.pop()

    def _backward(self, total: torch.Tensor) -> None:
        """A mode is off within its own calls; what runs on the way back is to be under it as well."""
        with self:
            torch.autograd.Variable._execution_engine.run_backward(  # type: ignore[attr-defined]
                (total,), (torch.ones_like(total),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )


class _Moved(torch.autograd.Function):
    """A move whose gradient moves back, as it does between GPUs; here autograd sees a CPU on both sides."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, device: torch.device, source: torch.device) -> torch.Tensor:
        ctx.source = source
        return tensor.detach().to(device)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0].to(ctx.source), None, None


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
        places = [self._devices.of(tensor) for tensor in given]
        # As on GPUs, a number in a tensor of the CPU's own may take part anywhere.
        on = {place for tensor, place in zip(given, places, strict=True) if tensor.dim() > 0 or place is not None}
        on.discard(ANYWHERE)
        wanted = kwargs.get("device")
        name = func._schema.name
        if name in COPIES:
            there = on | {wanted} if wanted is not None else on
            self._devices.copies += len(there) > 1
        elif len(on) > 1:
            raise MixedDevices(f"{name} on {sorted(map(str, on))}")
        out = func(*args, **kwargs)
        by_autograd = self._devices.calls[-1:] == [torch.autograd.backward]
        if wanted is None or (by_autograd and wanted.index is None):
            here = next(iter(on), ANYWHERE if by_autograd and not given else None)
        else:
            here = wanted if wanted.index is not None else None
        if here is None:
            return out
        for tensor, place in zip(given, places, strict=True):
            if place is ANYWHERE:
                self._devices.put(tensor, here)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and self._devices.of(leaf) is None:
                self._devices.put(leaf, here)
        return out


@contextmanager
def pretend() -> Iterator[Devices]:
    """Within it, tensors made with `device=cpu:1` or moved there are there."""
    devices = Devices()
    with _Says(devices), _Minds(devices):
        yield devices
