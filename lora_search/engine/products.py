"""Products with frozen weights and with adapters, by the library that is fastest at them on the device.

Legend: N rows; I and O in- and out-features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from lora_search.memory.values import PIECE_BYTES, ROWS
from lora_search.model import FrozenBase


def working_dtype(base: FrozenBase) -> torch.dtype:
    """What adapters and activations are computed in.

    On a CPU float32 even where the frozen products are bfloat16: those are four times as fast, but everything
    element by element is several times slower (analysis/benchmarks/NOTES.md).
    """
    return torch.float32 if base.device.type == "cpu" else base.compute_dtype


def product(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T, multiplied in the weight's dtype, in the dtype of x.

    In float32 on a CPU with AVX-512 through oneDNN, which uses it; MKL, torch's first choice, stops at AVX2 on CPUs of
    another maker than its own (100 against 230 GFLOP/s a core). Elsewhere MKL is faster.
    """
    return multiplied(x_NI, weight_OI).to(x_NI.dtype)


def product_of_rows(x_NI: torch.Tensor, weight_OI: torch.Tensor, rows: Sequence[slice]) -> torch.Tensor:
    """x W^T, both of one dtype, a product for each stretch of rows."""
    y_NO = x_NI.new_empty(len(x_NI), len(weight_OI))
    for some in rows:
        put_product(y_NO[some], x_NI[some], weight_OI)
    return y_NO


def add_product_of_rows(
    total_NO: torch.Tensor, x_NI: torch.Tensor, weight_OI: torch.Tensor, rows: Sequence[slice]
) -> None:
    """total += x W^T, a product for each stretch of rows, multiplied in the weight's dtype."""
    if total_NO.dtype == weight_OI.dtype and not _is_onednns(x_NI, weight_OI):
        for some in rows:
            total_NO[some].addmm_(x_NI[some], weight_OI.t())
    else:
        total_NO.add_(product_of_rows(x_NI.to(weight_OI.dtype), weight_OI, rows))


def put_product(y_NO: torch.Tensor, x_NI: torch.Tensor, weight_OI: torch.Tensor) -> None:
    """y = x W^T, all of one dtype."""
    if _is_onednns(x_NI, weight_OI) and (x_NI.dtype == torch.float32 or len(x_NI) % ROWS):
        y_NO.copy_(multiplied(x_NI, weight_OI))
    else:
        torch.mm(x_NI, weight_OI.t(), out=y_NO)


def _is_onednns(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    return x_NI.device.type == "cpu" and (_ONEDNN or weight_OI.dtype != torch.float32)


def multiplied(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T in the dtype of the weight; by oneDNN of x with empty rows up to the next multiple of ROWS.

    oneDNN makes a kernel for every number of rows and keeps the last 1,024, which is 450 MB in a host of the demo.
    """
    if not _is_onednns(x_NI, weight_OI):
        return F.linear(x_NI.to(weight_OI.dtype), weight_OI)
    count = len(x_NI)
    rows = math.ceil(count / ROWS) * ROWS
    if rows > count:
        whole_NI = x_NI.new_empty((rows, x_NI.shape[1]), dtype=weight_OI.dtype)
        whole_NI[:count].copy_(x_NI)
        whole_NI[count:].zero_()
    else:
        whole_NI = x_NI.to(weight_OI.dtype)
    if _ONEDNN and whole_NI.dtype == torch.float32:
        y_NO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(whole_NI, weight_OI, None, "none", [], "")
    else:
        y_NO = F.linear(whole_NI, weight_OI)
    return y_NO[:count]


def pieces(rows: slice, features: int) -> Iterator[slice]:
    """The rows, so many at a time as a core's cache has room for, but no fewer than a product should have."""
    size = max(ROWS, PIECE_BYTES // (4 * features) // ROWS * ROWS)
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


def _is_intels() -> bool:
    """Whether MKL, which is Intel's, uses all that the CPU has."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


_ONEDNN = bool(
    torch.cpu.get_capabilities().get("avx512_f")
    and not _is_intels()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> None:
    """total += scale * left @ right, the sum kept in float32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)
