"""Checkpoints: safetensors and JSON, never pickle, in a folder that PEFT itself can load the adapter from.

A checkpoint travels between seat and host as a mapping of file names to bytes, so that the two need share no disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from lora_search.errors import SweepError

Checkpoint = Mapping[str, bytes]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRIAL = "trial.json"
"""Step, counters, schedule, and the digests of the other files; written last."""


def seal(files: Mapping[str, bytes], state: Mapping[str, object]) -> Checkpoint:
    """`files` with their TRIAL file: `state`, and the digests by which damage is noticed."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return {**files, TRIAL: json.dumps({**state, "sha256": digests}, indent=1).encode()}


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write all files; the one that names the digests of the others comes last, each complete or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(checkpoint, key=lambda name: name == TRIAL):
        part = folder / f".{name}.part"
        part.write_bytes(checkpoint[name])
        part.replace(folder / name)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint back.

    Raises:
        SweepError: a file is missing, or is not what was written.
    """
    try:
        names = [*json.loads((folder / TRIAL).read_bytes())["sha256"], TRIAL]
        checkpoint = {name: (folder / Path(name).name).read_bytes() for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SweepError(f"{folder}: the checkpoint is incomplete: {error}") from None
    verify(checkpoint, str(folder))
    return checkpoint


def verify(checkpoint: Checkpoint, source: str = "checkpoint") -> None:
    """Raise SweepError unless every file is, to the bit, the one that was sealed."""
    for name, digest in json.loads(checkpoint[TRIAL])["sha256"].items():
        if hashlib.sha256(checkpoint[name]).hexdigest() != digest:
            raise SweepError(f"{source}: {name} is damaged: it is not what was written")


def step_of(checkpoint: Checkpoint) -> int:
    """The optimiser steps that the checkpointed trial had done."""
    return int(json.loads(checkpoint[TRIAL])["step"])
