"""One base, many adapters, behind an OpenAI-compatible endpoint for trying trials side by side. Never imports Ray."""

from lora_search.serve.adapters import BASE, BEST, ServedAdapter, choose_trials, collect_adapters
from lora_search.serve.layout import ENGINES, write_layout

__all__ = [
    "BASE",
    "BEST",
    "ENGINES",
    "ServedAdapter",
    "choose_trials",
    "collect_adapters",
    "write_layout",
]
