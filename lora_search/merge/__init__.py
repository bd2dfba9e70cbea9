"""Merge an adapter into a standard model: shard by shard, verified, and complete or not at all. Never imports Ray."""

from lora_search.merge.memory import lack_of_memory
from lora_search.merge.merge import merge_adapter
from lora_search.merge.values import TOLERANCE, Check, LogitsDifference, Merged, Options, Text

__all__ = [
    "TOLERANCE",
    "Check",
    "LogitsDifference",
    "Merged",
    "Options",
    "Text",
    "lack_of_memory",
    "merge_adapter",
]
