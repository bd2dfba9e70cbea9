"""What a host builds when it starts: the real engine. Runs on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lora_search.host import TrainsTrials
from lora_search.imports import import_libraries
from lora_search.placement import HostPlace
from lora_search.spec import SweepSpec
from lora_search.sweep.capacity import devices_of, gauge, memory_of

if TYPE_CHECKING:
    from lora_search.data import TokenizedData

Build = Callable[[SweepSpec, HostPlace, int, Any], TrainsTrials]
"""Makes a host's engine, on the host, from the sweep, its place, its capacity and the data."""


def build_engine(spec: SweepSpec, place: HostPlace, capacity: int, data: TokenizedData) -> TrainsTrials:
    """The real engine, with the base on this host's device, or over its GPUs; on a CPU, a lane a core."""
    import_libraries()
    import torch

    from lora_search.engine import Engine
    from lora_search.model import load_base

    torch.set_num_threads(place.threads)
    lanes = min(place.threads, capacity)
    device, *others = devices_of(place)
    by_memory = spec.hosts.trials_per_host == "auto"
    memory = memory_of(spec, place, lanes, data) if by_memory or others else None
    fits = gauge(spec, place, memory, capacity, data) if memory is not None and by_memory else None
    split = memory.split if memory is not None else None
    return Engine(load_base(spec.base, device, others, split), data, lanes, fits)
