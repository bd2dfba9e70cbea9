"""The data: read once, rendered, split and tokenised once a sweep, then batched by every trial in its own order."""

from lora_search.data.batches import (
    Batch,
    FlatRows,
    collate,
    evaluation_batches,
    flatten,
    rows_by_length,
    training_rows,
)
from lora_search.data.rows import check_rows
from lora_search.data.tokens import TokenizedData, TokenSplit, tokenize_data

__all__ = [
    "Batch",
    "FlatRows",
    "TokenSplit",
    "TokenizedData",
    "check_rows",
    "collate",
    "evaluation_batches",
    "flatten",
    "rows_by_length",
    "tokenize_data",
    "training_rows",
]
