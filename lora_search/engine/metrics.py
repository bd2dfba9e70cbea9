"""What the engine says of a trial: a line a step, and a report when it was evaluated."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class StepMetrics:
    """One optimiser step of one trial."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Nats a target token, the mean over the whole effective batch, before the update."""
    grad_norm: float
    """L2 norm of the adapter's gradient before clipping."""
    lr: float
    """Learning rate of this step."""
    tokens: int
    """Real tokens of the batch, padding not counted."""


@dataclass(frozen=True)
class Report:
    """A trial's standing at one of its report steps."""

    step: int
    steps_total: int
    eval_loss: float
    """Nats a target token over the validation split."""
    perplexity: float
    token_accuracy: float
    """Share of the validation split's target tokens that are the most likely one."""
    train_loss: float
    """Mean of the step losses since the last report."""
    grad_norm: float
    """Mean of the gradient norms since the last report."""
    lr: float
    tokens: int
    """Real tokens trained on so far."""
    tokens_per_second: float
    """Real tokens a second of this trial's own training time since the last report."""
    seconds: float
    """This trial's own training and evaluation time so far."""
    peak_memory_bytes: int
    """Most memory that the trial's host has held: of its fullest GPU, or resident in its process."""
    trial_memory_bytes: int | None
    """What this trial adds to its host by the plan: adapter, gradient, optimiser state, and the activations of a pass
    over its longest rows. None where nobody plans by memory."""
    trainable_parameters: int
    history: tuple[StepMetrics, ...]
    """The steps since the last report."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def peak_memory_bytes(devices: Sequence[torch.device]) -> int:
    """The most this process has held: allocated on the fullest of its GPUs, or resident.

    On Linux getrusage(2) would tell of the process that started this one, if that had held more: it counts beyond exec.
    """
    if devices[0].type == "cuda":
        return max(int(torch.cuda.max_memory_allocated(device)) for device in devices)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
