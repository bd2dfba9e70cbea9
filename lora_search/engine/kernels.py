"""The products with the adapters of all trials, each one Triton kernel over all of them; dropout is drawn within.

A kernel finds every trial's matrices by their addresses: nothing is copied together, ranks may differ, and a gradient
is added where the trial keeps it. A mask is made anew wherever it is needed and never stored: it is a function of the
trial's key, the entrance, the row and the column (Philox with seven rounds; Salmon et al., 'Parallel random numbers: as
easy as 1, 2, 3', SC 2011). A kernel's `row` is a trial's in the table, by its numbers (`table.START` to `SCALE`, then
the records): Triton looks at every global name again at each launch.

Legend: T parts of the pack, N its tokens; K and C in- or out-features; S ranks of a trial behind one entrance, W room
for those of any trial.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from lora_search.engine.table import HEAD, Table

ROWS = 64
"""Of a trial that one program works on at once."""
DEPTH = 64
"""Features that are multiplied at once where they are summed up."""
COLUMNS = 128
"""Features that one program makes where they come out."""
RANKS = 64
"""At most, at once."""


def down(
    out_NW: torch.Tensor, x_NK: torch.Tensor, table: Table, place: int, record: int, *, drop: bool, scale: bool
) -> None:
    """out = drop(x) M^T, or scale * that, for every trial's M (S, K); into the record's columns of W."""
    ranks = table.ranks(record)
    block = _block(ranks)
    grid = (_parts(table.longest, ROWS), table.parts, _parts(ranks, block))
    launch = _Launch(x_NK, out_NW, table, place, record, drop, scale)
    launch(_down, grid, RANKS=block, DEPTH=DEPTH, num_stages=3)


def add_up(
    y_NC: torch.Tensor, down_NW: torch.Tensor, table: Table, place: int, record: int, *, drop: bool, scale: bool
) -> None:
    """y += down M, or scale * that, or dropped as x was, for every trial's M (S, C)."""
    block = _block(table.ranks(record))
    grid = (_parts(table.longest, ROWS), table.parts, _parts(y_NC.shape[1], COLUMNS))
    launch = _Launch(y_NC, down_NW, table, place, record, drop, scale)
    launch(_up, grid, RANKS=block, COLUMNS=COLUMNS, num_stages=2)


def add_outer(
    down_NW: torch.Tensor, x_NC: torch.Tensor, table: Table, place: int, record: int, *, drop: bool, scale: bool
) -> None:
    """Gradient of M += down^T drop(x), or scale * that, for every trial's M (S, C), in float32 where it keeps it."""
    ranks = table.ranks(record)
    block, columns = _block(ranks), COLUMNS // 2
    grid = (_parts(x_NC.shape[1], columns), table.parts, _parts(ranks, block))
    launch = _Launch(x_NC, down_NW, table, place, record, drop, scale)
    launch(_outer, grid, RANKS=block, COLUMNS=columns, num_stages=3)


@dataclass(frozen=True)
class _Launch:
    """What all kernels are given."""

    features: torch.Tensor
    """(N, K or C)."""
    down_NW: torch.Tensor
    table: Table
    place: int
    record: int
    drop: bool
    scale: bool

    def __call__(self, kernel: Any, grid: tuple[int, int, int], **shape: int) -> None:
        table, features = self.table, self.features
        row_bytes = features.shape[1] * features.element_size()
        # Triton launches on the current device; the layers of a base may be on several.
        with torch.cuda.device(features.device.index if features.device.type == "cuda" else -1):
            kernel[grid](
                *(features, self.down_NW, table.on_device, table.stride, table.at, HEAD + 4 * self.record, self.place),
                *(features.shape[1], self.down_NW.shape[1]),
                DROPS=self.drop and table.drops,
                SCALES=self.scale,
                ALIGNED=table.aligned and row_bytes % 16 == 0,
                ROWS=ROWS,
                num_warps=4,
                **shape,
            )


def _parts(numbers: int, of: int) -> int:
    return -(-numbers // of)


def _block(ranks: int) -> int:
    return min(RANKS, max(16, 1 << (ranks - 1).bit_length()))


UNSPECIALISED = ("at", "record", "place")


@triton.jit
def _kept(row, place, rows, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """True where dropout leaves a number: of a trial's own rows, and of COLUMNS columns from `first` on."""
    zeros = tl.zeros((ROWS, COLUMNS // 8), tl.uint32)
    octets = (first // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)
    own = (rows - tl.load(row)).to(tl.uint32)
    a, b, c, d = tl.philox(
        tl.load(row + 2), zeros + octets[None, :], zeros + own[:, None], zeros + place.to(tl.uint32), zeros, 7
    )
    words = tl.join(tl.join(a, b), tl.join(c, d))
    levels = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(levels >= tl.load(row + 3).to(tl.uint32), (ROWS, COLUMNS))


@triton.jit
def _scale(row):
    return tl.load(row + 4).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _matrix(address, like):
    return address.to(tl.pointer_type(like.dtype.element_ty))


@triton.jit(do_not_specialize=UNSPECIALISED)
def _down(
    x_ptr,
    out_ptr,
    table_ptr,
    stride,
    at,
    record,
    place,
    features,
    width,
    DROPS: tl.constexpr,
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = table_ptr + tl.program_id(1) * stride + at
    rows = tl.load(row) + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    stop = tl.load(row + 1)
    ranks = tl.load(row + record + 2)
    first = tl.program_id(2) * RANKS
    if tl.min(rows) >= stop or first >= ranks:
        return
    s = first + tl.arange(0, RANKS)
    matrix = _matrix(tl.load(row + record), x_ptr)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(0, features, DEPTH):
        k = start + tl.arange(0, DEPTH)
        x = tl.load(
            x_ptr + rows[:, None] * features + k[None, :],
            mask=(rows[:, None] < stop) & (k[None, :] < features),
            other=0.0,
        )
        if DROPS:
            x = tl.where(_kept(row, place, rows, start, ROWS, DEPTH), x, 0.0)
        m_ptr = matrix + s[:, None] * features + k[None, :]
        if ALIGNED:
            m_ptr = tl.multiple_of(m_ptr, [16, 16])
        m = tl.load(m_ptr, mask=(s[:, None] < ranks) & (k[None, :] < features), other=0.0)
        total = tl.dot(x, tl.trans(m), total, input_precision="ieee")
    if SCALES:
        total *= _scale(row)
    column = tl.load(row + record + 3)
    out = out_ptr + rows[:, None] * width + (column + s)[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < stop) & (s[None, :] < ranks))


@triton.jit(do_not_specialize=UNSPECIALISED)
def _up(
    y_ptr,
    down_ptr,
    table_ptr,
    stride,
    at,
    record,
    place,
    features,
    width,
    DROPS: tl.constexpr,
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = table_ptr + tl.program_id(1) * stride + at
    rows = tl.load(row) + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    stop = tl.load(row + 1)
    ranks = tl.load(row + record + 2)
    if tl.min(rows) >= stop or ranks == 0:
        return
    first = tl.program_id(2) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    matrix = _matrix(tl.load(row + record), y_ptr)
    down = down_ptr + tl.load(row + record + 3)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, ranks, RANKS):
        s = start + tl.arange(0, RANKS)
        d_ptr = down + rows[:, None] * width + s[None, :]
        m_ptr = matrix + s[:, None] * features + columns[None, :]
        if ALIGNED:
            d_ptr = tl.multiple_of(d_ptr, [16, 16])
            m_ptr = tl.multiple_of(m_ptr, [16, 16])
        d = tl.load(d_ptr, mask=(rows[:, None] < stop) & (s[None, :] < ranks), other=0.0)
        m = tl.load(m_ptr, mask=(s[:, None] < ranks) & (columns[None, :] < features), other=0.0)
        total = tl.dot(d, m, total, input_precision="ieee")
    if SCALES:
        total *= _scale(row)
    if DROPS:
        total = tl.where(_kept(row, place, rows, first, ROWS, COLUMNS), total, 0.0)
    y = y_ptr + rows[:, None] * features + columns[None, :]
    here = (rows[:, None] < stop) & (columns[None, :] < features)
    total += tl.load(y, mask=here, other=0.0).to(tl.float32)
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _outer(
    x_ptr,
    down_ptr,
    table_ptr,
    stride,
    at,
    record,
    place,
    features,
    width,
    DROPS: tl.constexpr,
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = table_ptr + tl.program_id(1) * stride + at
    ranks = tl.load(row + record + 2)
    first_rank = tl.program_id(2) * RANKS
    if first_rank >= ranks:
        return
    stop = tl.load(row + 1)
    s = first_rank + tl.arange(0, RANKS)
    first = tl.program_id(0) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    down = down_ptr + tl.load(row + record + 3)
    total = tl.zeros((RANKS, COLUMNS), tl.float32)
    for start in range(tl.load(row), stop, ROWS):
        rows = start + tl.arange(0, ROWS)
        d_ptr = down + rows[:, None] * width + s[None, :]
        if ALIGNED:
            d_ptr = tl.multiple_of(d_ptr, [16, 16])
        d = tl.load(d_ptr, mask=(rows[:, None] < stop) & (s[None, :] < ranks), other=0.0)
        x = tl.load(
            x_ptr + rows[:, None] * features + columns[None, :],
            mask=(rows[:, None] < stop) & (columns[None, :] < features),
            other=0.0,
        )
        if DROPS:
            x = tl.where(_kept(row, place, rows, first, ROWS, COLUMNS), x, 0.0)
        total = tl.dot(tl.trans(d), x, total, input_precision="ieee")
    if SCALES:
        total *= _scale(row)
    gradient = tl.load(row + record + 1).to(tl.pointer_type(tl.float32))
    g = gradient + s[:, None] * features + columns[None, :]
    here = (s[:, None] < ranks) & (columns[None, :] < features)
    tl.store(g, tl.load(g, mask=here, other=0.0) + total, mask=here)
