"""Lanes: on a CPU, passes that run side by side, each on its share of the cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Lanes:
    """As many lanes as torch has threads; one on a GPU, which is busy with one pass.

    The layers of a small model are too small to be divided: OpenMP's threads wait for each other at the end of each
    of thousands of operations. A pass a core waits for nothing (analysis/benchmarks/NOTES.md).
    """

    def __init__(self, device: torch.device) -> None:
        self.count = torch.get_num_threads() if device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(self.count, "lane") if self.count > 1 else None

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """`work` on every item, side by side; a single one has all the cores."""
        if self._pool is None or len(items) < 2:
            return map(work, items)
        threads = max(1, self.count // len(items))

        def in_lane(item: T) -> R:
            torch.set_num_threads(threads)  # of the products that this thread starts
            return work(item)

        return self._pool.map(in_lane, items)
