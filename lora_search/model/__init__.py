"""The base: the frozen pretrained model of a sweep, quantised to NF4, and its tokenizer."""

from lora_search.model.identity import base_fingerprint
from lora_search.model.load import FrozenBase, load_base, load_tokenizer, model_path
from lora_search.model.precision import compute_dtype, round_trip_nf4

__all__ = [
    "FrozenBase",
    "base_fingerprint",
    "compute_dtype",
    "load_base",
    "load_tokenizer",
    "model_path",
    "round_trip_nf4",
]
