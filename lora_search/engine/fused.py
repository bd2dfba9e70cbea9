"""The adapters of all trials in kernels of their own, a kernel for each product however many trials there are.

On a GPU a step of small trials takes as long as its kernels take to be launched, and what they read and write for the
adapters' sake adds up: here neither grows with the trials but by their own rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch

from lora_search.engine.adapter import Places
from lora_search.engine.pack import Pack
from lora_search.engine.table import Table, tables
from lora_search.engine.trouble import device_fails_host, is_out_of_memory
from lora_search.errors import HostFailed

logger = logging.getLogger(__name__)


@cache
def fuses(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there, with the Triton that torch brings on Linux; found out by running them.

    Raises:
        HostFailed: the device computes no longer.
        torch.OutOfMemoryError, RuntimeError: its memory is full.
    """
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    reason = "they compute something else"
    try:
        with device_fails_host():
            if probe(device, dtype):
                return True
    except HostFailed:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    logger.warning(
        "Triton compiles no kernels on %s (%s); trials have products of their own, which takes longer, and other "
        "dropout masks than where it does",
        *(device, reason),
    )
    return False


def probe(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compute what they should, at their largest.

    They are compiled here: that takes a GPU that Triton knows, gcc, and Python's headers.
    """
    from lora_search.engine.kernels import add_outer, add_up, down

    rows, features, ranks, one = 16, 128, 64, 0x3F80_0000
    x = (torch.arange(rows * features, device=device) % 7).view(rows, features).to(dtype)
    matrix = torch.eye(ranks, features, device=device).to(dtype)
    gradient = torch.zeros(ranks, features, device=device)
    numbers = [[0, rows, 0, 0, one, matrix.data_ptr(), gradient.data_ptr(), ranks, 0]]
    table = Table(torch.tensor(numbers, device=device), len(numbers[0]), 0, (ranks,), True, True, rows)
    out, y = torch.zeros(rows, ranks, device=device).to(dtype), x.clone()
    down(out, x, table, 0, 0, drop=True, scale=True)
    add_up(y, out, table, 0, 0, drop=True, scale=True)
    add_outer(out, x, table, 0, 0, drop=True, scale=True)
    return (
        torch.equal(out, x[:, :ranks])
        and torch.equal(y, x + torch.cat([out, torch.zeros_like(out)], 1))
        and torch.equal(gradient, out.float().t() @ x.float())
    )


class Fused:
    """`lora.Adapters` for the layers behind one entrance."""

    def __init__(self, siblings: Places, table: Table) -> None:
        from lora_search.engine import kernels  # imports Triton, which is not everywhere

        self._kernels = kernels
        self._table = table
        self._records = {place: 1 + index for index, place in enumerate(siblings) if table.ranks(1 + index)}
        self._place = siblings[0]
        self._grad_down_NW: torch.Tensor | None = None

    def adapts(self, place: int) -> bool:
        return place in self._records

    def enter(self, x_NI: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        down_NW = x_NI.new_empty(len(x_NI), self._width)
        self._kernels.down(down_NW, x_NI, self._table, self._place, 0, drop=True, scale=False)
        return [down_NW], [None]

    def add(self, place: int, y_NO: torch.Tensor, downs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if place not in self._records:
            return []
        self._kernels.add_up(y_NO, downs[0], self._table, self._place, self._records[place], drop=False, scale=True)
        return [downs[0]]

    def gather(self, place: int, grad_NO: torch.Tensor, saved: Sequence[torch.Tensor]) -> None:
        if place not in self._records:
            return
        record, grad_NO = self._records[place], grad_NO.contiguous()
        self._kernels.add_outer(saved[0], grad_NO, self._table, self._place, record, drop=False, scale=True)
        if self._grad_down_NW is None:
            self._grad_down_NW = torch.zeros_like(saved[0])
        self._kernels.down(self._grad_down_NW, grad_NO, self._table, self._place, record, drop=False, scale=True)

    def leave(self, x_NI: torch.Tensor, keeps: Sequence[torch.Tensor | None], grad_NI: torch.Tensor | None) -> None:
        grad_down_NW, self._grad_down_NW = self._grad_down_NW, None
        if grad_down_NW is None:  # what the adapted layers make had no influence
            return
        self._kernels.add_outer(grad_down_NW, x_NI, self._table, self._place, 0, drop=True, scale=False)
        if grad_NI is not None:
            self._kernels.add_up(grad_NI, grad_down_NW, self._table, self._place, 0, drop=True, scale=False)

    @property
    def _width(self) -> int:
        """W, in whole rows of 16 bytes."""
        return -(-self._table.ranks(0) // 16) * 16


def fused_behind(pack: Pack, siblings: Places, device: torch.device) -> Fused | None:
    """None where no trial is adapted there, or the layers' company is not known."""
    table = tables(pack, device).get(siblings)
    return Fused(siblings, table) if table is not None and table.ranks(0) else None
