"""Merge an adapter into a standard model: shard by shard, verified, and complete or not at all. Never imports Ray."""

from lora_search.merge.gguf import gguf_form
from lora_search.merge.memory import lack_of_memory
from lora_search.merge.merge import gguf_path, merge_adapter
from lora_search.merge.values import TOLERANCE, Check, Gguf, LogitsDifference, Merged, Options, Text

__all__ = [
    "TOLERANCE",
    "Check",
    "Gguf",
    "LogitsDifference",
    "Merged",
    "Options",
    "Text",
    "gguf_form",
    "gguf_path",
    "lack_of_memory",
    "merge_adapter",
]
