"""Loss and accuracy over a split.

Legend: B sequences, T positions, M target tokens of the batch, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from lora_search.data import Batch, TokenSplit, evaluation_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_search.model import FrozenBase

LOGITS_BYTES = 1 << 30
"""Evaluation batches are cut so that their float32 logits stay below this."""


@dataclass(frozen=True)
class Evaluation:
    """A model's standing on a split."""

    loss: float
    """Nats a target token."""
    token_accuracy: float
    targets: int
    losses_N: npt.NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    """Summed loss of each of the split's rows, in nats; None where it was not asked for, as is the next."""
    targets_N: npt.NDArray[np.int64] | None = field(default=None, repr=False, compare=False)
    """Target tokens of each of the split's rows."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp overflows a float above 709


@torch.no_grad()
def evaluate(base: FrozenBase, split: TokenSplit, pad_token_id: int) -> Evaluation:
    """The base's loss on a split, under whatever adapter is active. Leaves the model in evaluation mode."""
    base.model.eval()
    vocabulary = base.model.get_output_embeddings().weight.shape[0]
    max_tokens = min(8192, max(1, LOGITS_BYTES // (4 * vocabulary)))
    loss, correct, targets = 0.0, 0, 0
    for batch in evaluation_batches(split, pad_token_id, max_tokens):
        logits_MV, targets_M = target_logits(base, batch.to(base.device))
        loss += float(F.cross_entropy(logits_MV, targets_M, reduction="sum"))
        correct += int((logits_MV.argmax(-1) == targets_M).sum())
        targets += batch.targets
    return Evaluation(loss / targets, correct / targets, targets)


def target_logits(base: FrozenBase, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 logits for the batch's target tokens, and those tokens: shapes (M, V) and (M,)."""
    model: PreTrainedModel = base.model
    with base.autocast:
        logits_BTV = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).logits
    counted_BT = batch.trained_BT[:, 1:]
    return logits_BTV[:, :-1][counted_BT].float(), batch.input_ids_BT[:, 1:][counted_BT]
