"""Lanes: on a CPU, passes that run side by side, each on its share of the cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Lanes:
    """A number of threads that run passes; one, and no thread of its own, on a GPU, which is busy with one pass.

    The layers of a small model are too small to be divided: OpenMP's threads wait for each other at the end of each
    of thousands of operations. A pass a core waits for nothing (analysis/benchmarks/NOTES.md).
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.count = count if device.type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None
        if self.count > 1:
            threads = max(1, torch.get_num_threads() // self.count)
            self._pool = ThreadPoolExecutor(self.count, "lane", torch.set_num_threads, (threads,))
        self.in_turn = False
        """Whether what the passes use is such that there may be but one at a time, as it stands."""

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """`work` on every item, side by side, or in turn; a pass has the same number of threads either way."""
        if self._pool is None:
            return map(work, items)
        if self.in_turn:
            return (self._pool.submit(work, item).result() for item in items)
        return self._pool.map(work, items)
