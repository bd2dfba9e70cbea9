"""One base, many adapters, behind an OpenAI-compatible endpoint for trying trials side by side. Never imports Ray."""

from lora_search.serve.adapters import BASE, BEST, ServedAdapter, collect_adapters

__all__ = ["BASE", "BEST", "ServedAdapter", "collect_adapters"]
