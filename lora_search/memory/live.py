"""Count the bytes that torch holds while it computes, on any device; on the meta device nothing is computed at all."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
