"""A plan, as values."""

from __future__ import annotations

from dataclasses import dataclass

from lora_search.memory import HostBytes, TrialBytes, Weights
from lora_search.plan.rows import RowFacts
from lora_search.plan.schedule import Schedule


@dataclass(frozen=True)
class BasePlan:
    """A base as it is held on one kind of device."""

    device: str
    compute: str
    weights: Weights


@dataclass(frozen=True)
class CornerPlan:
    """A trial at a corner of the space, on one kind of device."""

    target_modules: str
    size: str
    rank: int
    batch_size: int
    dropout: bool
    bytes: TrialBytes
    recomputed: int
    """Bytes of its activations, and what passes, with gradient checkpointing."""


@dataclass(frozen=True)
class DevicePlan:
    """How many trials of the space fit together on a host with such devices, and how long the sweep takes on one."""

    name: str
    here: bool
    memory: int
    usable: int
    compute: str
    smallest: int
    largest: int
    smallest_recomputed: int
    """With gradient checkpointing."""
    largest_recomputed: int
    needs_checkpointing: bool
    """Whether the largest trial fits with it alone."""
    never: bool
    """Whether the largest trial fits in no way."""
    seconds: float
    """Expected duration of the sweep on one such host; layers wait for each other: several GPUs are as fast as one."""


@dataclass(frozen=True)
class SweepPlan:
    """The sweep's amount of work."""

    schedule: Schedule
    train_tokens: int
    """Expected, over all trials."""
    train_tokens_most: int
    evaluation_tokens: int
    passes: int
    """Forward and backward passes of single trials, expected."""
    flops: float
    flops_most: float
    layers: int
    epochs: float | None
    """Of the longest trial over the training rows."""


@dataclass(frozen=True)
class Plan:
    """What a sweep will cost."""

    name: str
    model: str
    architecture: str
    parameters: int
    checkpointing: bool
    """As the sweep file says."""
    quantization: str
    rows: RowFacts
    bases: tuple[BasePlan, ...]
    by_rule: bool
    """Whether activations are by a rule of thumb, for an architecture whose code does not run on shapes alone."""
    corner_device: str
    corners: tuple[CornerPlan, ...]
    host: HostBytes
    """With the largest trial alone, on the device of `corners`."""
    devices: tuple[DevicePlan, ...]
    hosts: int
    gpus_per_host: int
    """Over which a base is split on a host, wherever `devices` are GPUs."""
    trials_per_host: int
    sweep: SweepPlan
    refused: str | None
    """What `run` says here of a trial that can never fit."""
    advice: str | None
    """Of rows longer than the base was made for."""
