"""Random numbers of a trial's own for what PEFT draws from torch's global generators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, devices: Sequence[torch.device]) -> Iterator[None]:
    """Draw from a stream that follows from `seed` alone; the global generators are as before afterwards."""
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        torch.manual_seed(seed)
        yield
