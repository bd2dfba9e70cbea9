"""What a host of a sweep may hold: its memory, as the planner predicts it for the base and the data at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lora_search.memory import BaseMemory, Setup, corners, refuse_what_never_fits
from lora_search.memory.gauge import Gauge, usable_bytes
from lora_search.placement import HostPlace
from lora_search.spec import SweepSpec
from lora_search.targets import skeleton

if TYPE_CHECKING:
    import torch

    from lora_search.data import TokenizedData


def device_of(place: HostPlace) -> torch.device:
    """The device that a host trains on."""
    import torch

    return torch.device("cuda" if place.gpus and torch.cuda.is_available() else "cpu")


def gauge(spec: SweepSpec, place: HostPlace, lanes: int, most: int, data: TokenizedData) -> Gauge:
    """How a host tells which trials fit together. Made before the base is loaded."""
    usable = usable_bytes(device_of(place), place.neighbours)
    return Gauge(spec, _memory(spec, place, lanes, data), usable, _rows(data), most)


def refuse_too_large(spec: SweepSpec, place: HostPlace, data: TokenizedData) -> None:
    """Refuse a sweep of which a trial could never be trained on a host like this.

    Raises:
        InputError: names the key of the sweep file that makes it too large.
    """
    memory = _memory(spec, place, 1, data)
    device = device_of(place)
    largest = {corner.target: corner for corner in corners(spec, memory.tree, _rows(data))}  # the last of each set
    name = "the GPU" if device.type == "cuda" else "a host"
    refuse_what_never_fits(spec, memory, tuple(largest.values()), usable_bytes(device, place.neighbours), name)


def _memory(spec: SweepSpec, place: HostPlace, lanes: int, data: TokenizedData) -> BaseMemory:
    from lora_search.model import compute_dtype

    device = device_of(place)
    base = spec.base
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    auto = str(compute_dtype("auto", device)).removeprefix("torch.")
    setup = Setup.of(base, kind, auto, lanes=lanes, validation_tokens=len(data.validation.tokens_S))
    return BaseMemory(skeleton(base.model, trust_remote_code=base.trust_remote_code, revision=base.revision), setup)


def _rows(data: TokenizedData) -> int:
    """Tokens of the longest row."""
    return int(max(split.lengths_N.max() for split in (data.train, data.validation)))
