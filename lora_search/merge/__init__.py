"""Merge an adapter into a standard model: shard by shard, verified, and complete or not at all. Never imports Ray."""

from lora_search.merge.gguf import gguf_form
from lora_search.merge.memory import BESIDE, lack_of_memory
from lora_search.merge.merge import gguf_path, merge_adapter
from lora_search.merge.values import TOLERANCE, Check, Gguf, LogitsDifference, Merged, Options, Text
from lora_search.merge.verify import begin_ahead, end_ahead

__all__ = [
    "BESIDE",
    "TOLERANCE",
    "Check",
    "Gguf",
    "LogitsDifference",
    "Merged",
    "Options",
    "Text",
    "begin_ahead",
    "end_ahead",
    "gguf_form",
    "gguf_path",
    "lack_of_memory",
    "merge_adapter",
]
