"""What a host says when it starts, and what it builds: the real engine. Runs on the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lora_search.host import TrainsTrials
from lora_search.imports import import_libraries
from lora_search.placement import HostPlace
from lora_search.rundir import SWEEP_FILE
from lora_search.spec import SweepSpec
from lora_search.storage import Folder, is_uri
from lora_search.sweep.capacity import devices_of, gauge, memory_of
from lora_search.versions import versions

if TYPE_CHECKING:
    from lora_search.data import TokenizedData

Build = Callable[[SweepSpec, HostPlace, int, Any], TrainsTrials]
"""Makes a host's engine, on the host, from the sweep, its place, its capacity and the data."""


SEEN_S = 60.0
"""A shared folder may take so long to show one machine what another has written: NFS keeps directories that long."""

STORE_S = 30.0
"""An object store that fails is asked again for so long."""


def greet(run: Folder | None) -> tuple[dict[str, str | None], str | None]:
    """What a host says first: the versions on its node, and why it cannot use the run directory, where it cannot."""
    return versions(), None if run is None else _unseen(run)


def _unseen(run: Folder) -> str | None:
    end = time.monotonic() + SEEN_S
    try:
        while not is_uri(run.place) and SWEEP_FILE not in run.names():
            if time.monotonic() > end:
                return f"{run.place} is not there"
            time.sleep(1)
        Folder(run.place, STORE_S).check()
    except (OSError, ValueError) as error:
        return str(error)
    return None


def build_engine(spec: SweepSpec, place: HostPlace, capacity: int, data: TokenizedData) -> TrainsTrials:
    """The real engine, with the base on this host's device, or over its GPUs; on a CPU, a lane a core.

    Raises:
        InputError: the base cannot be loaded.
        HostFailed: the device computes no longer.
    """
    import_libraries()
    from lora_search.engine.trouble import device_fails_host

    with device_fails_host():
        return _build(spec, place, capacity, data)


def _build(spec: SweepSpec, place: HostPlace, capacity: int, data: TokenizedData) -> TrainsTrials:
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
