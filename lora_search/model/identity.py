"""What tells one base from another of the same name."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

SAMPLES, SAMPLE_BYTES = 64, 4096
"""Of each file of weights, at even distances. Whatever trains or quantises a model anew changes nearly all of it."""


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
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            for sample in range(SAMPLES):
                opened.seek(size * sample // SAMPLES)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()
