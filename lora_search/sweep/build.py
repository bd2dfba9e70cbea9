"""What a host builds when it starts: the real engine. Runs on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lora_search.host import TrainsTrials
from lora_search.placement import HostPlace
from lora_search.spec import SweepSpec
from lora_search.sweep.capacity import device_of, gauge

if TYPE_CHECKING:
    from lora_search.data import TokenizedData

Build = Callable[[SweepSpec, HostPlace, int, Any], TrainsTrials]
"""Makes a host's engine, on the host, from the sweep, its place, its capacity and the data."""


def build_engine(spec: SweepSpec, place: HostPlace, capacity: int, data: TokenizedData) -> TrainsTrials:
    """The real engine, with the base on this host's device; on a CPU, a lane a core."""
    import torch

    from lora_search.engine import Engine
    from lora_search.model import load_base

    torch.set_num_threads(place.threads)
    lanes = min(place.threads, capacity)
    fits = gauge(spec, place, lanes, capacity, data) if spec.hosts.trials_per_host == "auto" else None
    return Engine(load_base(spec.base, device_of(place)), data, lanes, fits)


def import_engine() -> None:
    """Import what an engine takes seconds to import."""
    import lora_search.engine
    import lora_search.model  # noqa: F401
