"""The figures by which models are usually compared, for any base, and the assumptions that decide them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_search.memory.estimate import BaseMemory
from lora_search.memory.values import Setup, TrialShape
from lora_search.targets import available_sets, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANK = 16
LENGTHS = (256, 512)

HALF = Setup("cuda", "float16", quantised=False, validation_tokens=0)
QLORA = replace(HALF, quantised=True)


@dataclass(frozen=True)
class Familiar:
    """One way to train a base, in bytes: half-precision products, rank 16 on attention, nothing evaluated."""

    way: str
    short: int
    """With rows of 256 tokens."""
    long: int
    """With rows of 512 tokens."""
    recomputed: int
    """With rows of 512 tokens and gradient checkpointing."""


def familiar_figures(skeleton: Callable[[], PreTrainedModel]) -> tuple[Familiar, ...]:
    """Full fine-tuning, LoRA, QLoRA, and QLoRA with batches of four.

    Args:
        skeleton: makes the base anew; each prediction changes its own for good.
    """
    half, recomputing = (BaseMemory(skeleton(), replace(HALF, checkpointing=on)) for on in (False, True))
    nf4, nf4_recomputing = (BaseMemory(skeleton(), replace(QLORA, checkpointing=on)) for on in (False, True))
    full = 2 * half.weights.total
    return (
        Familiar("full fine-tuning, weights and gradients alone", full, full, full),
        _trained("LoRA on half-precision weights, batch 1", half, recomputing, 1),
        _trained("QLoRA, batch 1", nf4, nf4_recomputing, 1),
        _trained("QLoRA, batch 4", nf4, nf4_recomputing, 4),
    )


def _trained(way: str, kept: BaseMemory, recomputed: BaseMemory, batch: int) -> Familiar:
    sets = available_sets(kept.tree)
    targets = resolve(kept.tree, "attention" if "attention" in sets else sets[-1])
    short, long = (TrialShape(targets, RANK, not targets.parameters, batch, length) for length in LENGTHS)
    return Familiar(way, kept.host([short]).total, kept.host([long]).total, recomputed.host([long]).total)
