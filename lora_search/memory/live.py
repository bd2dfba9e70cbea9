"""What torch does while it computes, on any device: the bytes that it holds, and whether it draws random numbers.

On the meta device nothing is computed at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten

POINTWISE = {
    *(_aten.mul.Tensor, _aten.mul.Scalar, _aten.add.Tensor, _aten.div.Scalar, _aten.neg.default),
    *(_aten.pow.Tensor_Scalar, _aten.rsqrt.default, _aten.silu.default),
}
"""What a decoder does number by number. For the meta device torch has them in Python alone: 0.3 ms each, more than half
of what a replay takes."""


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors that were made in this context and are there yet, whoever holds them.

    What a kernel takes for itself while it runs is not seen.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        """
        Args:
            known: tensors made before, which are not to be counted when a view of them is made.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._seen: set[int] = set()
        self._known = [tensor.untyped_storage() for tensor in known]
        self._seen.update(storage._cdata for storage in self._known)

    def restart(self) -> None:
        """Let the peak begin anew from what is there now."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in POINTWISE and not kwargs and args[0].is_meta:
            out = _unwritten(args)
        else:
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class Draws(TorchDispatchMode):
    """Whether anything in this context draws from torch's generators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Attention's kernels may drop, whether they do or not.
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in str(func)
        return func(*args, **(kwargs or {}))


def _unwritten(args: Sequence[Any]) -> torch.Tensor:
    """A tensor of the shape and type that an operation number by number has on the meta device."""
    shapes = [x.shape for x in args if isinstance(x, torch.Tensor)]
    dtype = torch.result_type(*args) if len(args) == 2 else args[0].dtype
    return torch.empty(torch.broadcast_shapes(*shapes), dtype=dtype, device="meta")
