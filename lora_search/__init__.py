"""Search LoRA and QLoRA hyperparameters over a cluster of GPUs, and hand over the best adapter, proven and merged."""

from __future__ import annotations

__version__ = "0.1.0"
