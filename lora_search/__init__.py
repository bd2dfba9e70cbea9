"""Search LoRA and QLoRA hyperparameters over a cluster of GPUs, and hand over the best adapter, proven and merged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_search.results import Run, Runs, open_run, open_runs

__version__ = "0.1.0"

__all__ = ["Run", "Runs", "open_run", "open_runs"]


def __getattr__(name: str) -> Any:
    """What is for notebooks, imported when it is asked for: `import lora_search` alone is light."""
    if name in __all__:
        from lora_search import results

        return getattr(results, name)
    raise AttributeError(f"module 'lora_search' has no attribute {name!r}")
