"""Numbers that a merged model's dtype cannot hold."""

from __future__ import annotations

import torch

from lora_search.errors import SweepError


def require_finite(name: str, before: torch.Tensor, written: torch.Tensor) -> None:
    """A tensor as it is written may not be infinite, or no number, where it was finite before.

    Raises:
        SweepError: it is; says in which dtype.
    """
    if torch.isfinite(written).all():
        return
    if before is written or (torch.isfinite(before) & ~torch.isfinite(written)).any():
        dtype = str(written.dtype).removeprefix("torch.")
        raise SweepError(f"{name}: is not finite after the merge in {dtype}; float32 and bfloat16 hold larger numbers")
