"""What a host of a sweep may hold: its memory, as the planner predicts it for the base and the data at hand."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from lora_search.errors import InputError
from lora_search.machine import gpus_are_logical, unseen_gpus
from lora_search.memory import BaseMemory, Setup, corners, refuse_what_never_fits
from lora_search.memory.gauge import Gauge, usable_bytes
from lora_search.placement import HostPlace, most_trials
from lora_search.spec import SweepSpec
from lora_search.targets import skeleton

if TYPE_CHECKING:
    import torch

    from lora_search.data import TokenizedData


def devices_of(place: HostPlace) -> tuple[torch.device, ...]:
    """The devices that a host trains on: the GPUs that Ray shows it, or its cores.

    Raises:
        InputError: it sees fewer GPUs than it was given.
    """
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not place.gpus or (not there and gpus_are_logical()):
        return (torch.device("cpu"),)
    if there < place.gpus:
        raise InputError(f"{place.name} on {os.uname().nodename}: {unseen_gpus(place.gpus, there)}")
    if place.gpus == 1:
        return (torch.device("cuda"),)
    return tuple(torch.device("cuda", index) for index in range(place.gpus))


def gauge(spec: SweepSpec, place: HostPlace, memory: BaseMemory, most: int, data: TokenizedData) -> Gauge:
    """How a host tells which trials fit together. Made before the base is loaded."""
    return Gauge(spec, memory, _usable_bytes(spec, place), _rows(data), most)


def refuse_too_large(spec: SweepSpec, place: HostPlace, data: TokenizedData) -> None:
    """Refuse a sweep of which a trial could never be trained on a host like this.

    Raises:
        InputError: names the key of the sweep file that makes it too large.
    """
    memory = memory_of(spec, place, 1, data)
    devices = devices_of(place)
    largest = {corner.target: corner for corner in corners(spec, memory.tree, _rows(data))}  # the last of each set
    name = "a host" if devices[0].type != "cuda" else "the GPU" if len(devices) == 1 else f"each of {len(devices)} GPUs"
    refuse_what_never_fits(spec, memory, tuple(largest.values()), _usable_bytes(spec, place), name)


def memory_of(spec: SweepSpec, place: HostPlace, lanes: int, data: TokenizedData) -> BaseMemory:
    """What is predicted for the base on a host like this.

    Raises:
        InputError: the base cannot be split over so many GPUs.
    """
    from lora_search.engine.fused import fuses
    from lora_search.model import compute_dtype

    devices = devices_of(place)
    base = spec.base
    working = compute_dtype(base.compute_dtype, devices[0])
    kind: Literal["cpu", "cuda"] = "cuda" if devices[0].type == "cuda" else "cpu"
    auto = str(compute_dtype("auto", devices[0])).removeprefix("torch.")
    setup = Setup.of(
        base,
        kind,
        auto,
        lanes=lanes,
        validation_tokens=len(data.validation.tokens_S),
        kernels=all(fuses(device, working) for device in devices),
        gpus=len(devices),
        gpu_bytes=_usable_bytes(spec, place),
    )
    return BaseMemory(skeleton(base.model, trust_remote_code=base.trust_remote_code, revision=base.revision), setup)


def _usable_bytes(spec: SweepSpec, place: HostPlace) -> int:
    return usable_bytes(devices_of(place), place.neighbours, most_trials(place, spec.hosts))


def _rows(data: TokenizedData) -> int:
    """Tokens of the longest row."""
    return int(max(split.lengths_N.max() for split in (data.train, data.validation)))
