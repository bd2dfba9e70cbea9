"""The data: read once, rendered, split and tokenised once a sweep, then batched by every trial in its own order."""

from lora_search.data.batches import Batch, collate, evaluation_batches, training_rows
from lora_search.data.tokens import TokenizedData, TokenSplit, tokenize_data

__all__ = [
    "Batch",
    "TokenSplit",
    "TokenizedData",
    "collate",
    "evaluation_batches",
    "tokenize_data",
    "training_rows",
]
