"""What tells one base from another of the same name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import try_to_load_from_cache
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

SAMPLES, SAMPLE_BYTES = 64, 4096
"""Of each file of weights, at even distances and where each tensor begins: whatever trains or quantises a model anew
changes nearly all of it, and who changes a layer by hand nearly all of that."""

HEADER_BYTES = 100 << 20
"""The most that safetensors reads of what stands before the tensors."""


def base_fingerprint(path: str, revision: str | None) -> str | None:
    """A digest of a model's configuration and of samples of its weights.

    Args:
        path: a folder, or a hub id of which all files that are needed have been loaded.

    Returns:
        None where the hub's cache does not have it.
    """
    folder = Path(path)
    if not folder.is_dir():
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in _weights(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            for place in sorted({*_beginnings(opened), *(size * sample // SAMPLES for sample in range(SAMPLES))}):
                opened.seek(place)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _beginnings(opened: BinaryIO) -> list[int]:
    """Where the tensors of a safetensors file begin (https://github.com/huggingface/safetensors, "Format"); none where
    it is none."""
    length = int.from_bytes(opened.read(8), "little")
    if length > HEADER_BYTES:
        return []
    try:
        header = json.loads(opened.read(length))
        offsets = [tensor["data_offsets"][0] for name, tensor in header.items() if name != "__metadata__"]
        return [8 + length + offset for offset in offsets if offset >= 0]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return []


def _weights(folder: Path) -> list[Path]:
    """The files that transformers loads; what else lies there may be another copy of the model, or a part of one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    whole, index = folder / (config.get("transformers_weights") or SAFE_WEIGHTS_NAME), folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.name.endswith(".index.json"):
        index = whole
    elif whole.is_file() or not index.is_file():
        return [whole] * whole.is_file()
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(named)) if (folder / name).is_file()]
