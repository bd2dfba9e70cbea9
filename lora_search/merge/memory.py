"""Whether a merged model can be verified here: that takes it into memory whole."""

from __future__ import annotations

import torch

from lora_search.machine import free_memory_bytes
from lora_search.merge.published import published_weights
from lora_search.merge.surroundings import base_folder
from lora_search.spec import Base

BESIDE = 1 << 30
"""Bytes for activations, logits, and a second process with its libraries."""


def lack_of_memory(base: Base, device: torch.device) -> str | None:
    """Why a merge cannot be verified on a device; None where it can, or where it is not known what is free.

    On a CPU the model is held in float32, elsewhere as it is published.

    Raises:
        InputError: the base has no weights in safetensors.
    """
    free, needed = free_bytes(device), _needed_bytes(base, device)
    if free is None or needed <= free:
        return None
    return (
        f"to verify the merged model it has to be loaded whole, which takes {needed / 1e9:.1f} GB of "
        f"{device.type.upper()} memory, and {free / 1e9:.1f} GB are free"
    )


def holds_two(base: Base, device: torch.device) -> bool:
    """Whether the model can be loaded twice at once, and something is gained by it: a GPU would compute in turns."""
    free = free_bytes(device) if device.type == "cpu" else None
    return free is not None and 2 * _needed_bytes(base, device) <= free


def _needed_bytes(base: Base, device: torch.device) -> int:
    published = published_weights(base_folder(base))
    return BESIDE + (published.bytes if device.type == "cuda" else 4 * published.numbers)


def free_bytes(device: torch.device) -> int | None:
    """Of a device's memory; None where the system does not tell."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory_bytes()
