"""Checkpoints: safetensors and JSON, never pickle, in a folder that PEFT itself can load the adapter from.

A checkpoint travels between seat and host as a mapping of file names to bytes, so that the two need share no disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_search.errors import SweepError
from lora_search.storage import Folder

Checkpoint = Mapping[str, bytes]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRIAL = "trial.json"
"""Step, counters, schedule, and the digests of the other files; written last."""

REPORTS = "reports.json"
"""The trial's parameters, and all that it had reported by then."""

MISSING = (FileNotFoundError, NotADirectoryError)
"""What reading a file raises that is not there. Whatever else it raises says nothing of what the file holds: of a file
server that is out of reach for a moment, or a store that fails, everything would be damaged."""

DAMAGED = (SweepError, *MISSING, ValueError)
"""What reading a checkpoint raises that is not whole."""

KEPT = 2
"""Checkpoints of a trial: the newest, and the one before should the newest be damaged."""


def seal(files: Mapping[str, bytes], state: Mapping[str, object]) -> Checkpoint:
    """`files` with their TRIAL file: `state`, and the digests by which damage is noticed, its own among them."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    whole = {**state, "sha256": digests}
    digests[TRIAL] = _digest(whole)
    return {**files, TRIAL: json.dumps(whole, indent=1).encode()}


def _digest(value: Mapping[str, object]) -> str:
    """Of what stands in a JSON file, before its digest is put there."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def write_checkpoint(checkpoint: Checkpoint, folder: Folder) -> None:
    """Write all files; the one that names the digests of the others comes last.

    Raises:
        OSError: there is no room, or no right to write.
    """
    for name in sorted(checkpoint, key=lambda name: name == TRIAL):
        folder.write(name, checkpoint[name])


def read_checkpoint(folder: Folder) -> Checkpoint:
    """Read a checkpoint back.

    Raises:
        SweepError: a file is missing, or is not what was written.
        OSError: it cannot be read now, which says nothing of the checkpoint.
    """
    try:
        names = [*_sealed(folder.read(TRIAL), folder.place)["sha256"], TRIAL]
        checkpoint = {name: folder.read(name.rpartition("/")[2]) for name in names}
    except (*MISSING, ValueError) as error:
        raise SweepError(f"{folder.place}: the checkpoint is incomplete: {error}") from None
    verify(checkpoint, folder.place)
    return checkpoint


def verify(checkpoint: Checkpoint, source: str = "checkpoint", needed: Collection[str] = ()) -> None:
    """Raise SweepError unless every file is, to the bit, the one that was sealed, and the needed are among them."""
    digests = _sealed(checkpoint[TRIAL], source)["sha256"]
    for name in dict.fromkeys([*digests, *needed]):
        if name not in digests or name not in checkpoint:
            raise SweepError(f"{source}: the checkpoint is incomplete: it has no {name}")
        if hashlib.sha256(checkpoint[name]).hexdigest() != digests[name]:
            raise SweepError(f"{source}: {name} is damaged: it is not what was written")


def _sealed(content: bytes, source: str) -> dict[str, Any]:
    """What a TRIAL file says.

    Raises:
        SweepError: it is none, or not what was written: it has no step, or no digests.
    """
    try:
        state: dict[str, Any] = json.loads(content)
        step, digests = state["step"], state["sha256"]
        own = digests.pop(TRIAL, None)  # checkpoints of before had none
        is_whole = type(step) is int and step >= 0 and digests != {} and own in (None, _digest(state))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SweepError(f"{source}: the checkpoint is incomplete: {TRIAL}: {error}") from None
    if not is_whole:
        raise SweepError(f"{source}: {TRIAL} is damaged: it has no step, or no digests, or others than were written")
    return state


def require_lora(folder: Path) -> None:
    """Raise SweepError unless an adapter is LoRA of PEFT's own layers: others may import modules by name."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        ordinary = config["peft_type"] == "LORA" and not config.get("megatron_config")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SweepError(f"{folder / ADAPTER_CONFIG}: is no adapter's: {error}") from None
    if not ordinary or not (folder / ADAPTER_WEIGHTS).is_file():  # PEFT would take adapter_model.bin
        raise SweepError(f"{folder}: is no LoRA adapter in {ADAPTER_WEIGHTS}")


def step_of(checkpoint: Checkpoint) -> int:
    """The optimiser steps that the checkpointed trial had done."""
    return int(_sealed(checkpoint[TRIAL], "checkpoint")["step"])


@dataclass(frozen=True)
class Saved:
    """Where a trial goes on."""

    checkpoint: Checkpoint | None
    """None where all that there are are damaged."""
    parameters: Mapping[str, Any] | None
    """Of the trial, as they were proposed; None where that is not known."""
    reports: Sequence[dict[str, Any]]
    """All that it had reported; whoever was to hear it may have been lost."""
    damaged: tuple[str, ...] = ()
    """What is wrong with later checkpoints, by which it comes that this is not the newest."""


class Shelf:
    """The checkpoints of one trial."""

    def __init__(self, run: Folder, trial: int) -> None:
        """
        Args:
            run: the run directory.
        """
        self._path = f"tune/{trial_folder(trial)}"
        self._folder = run.below(self._path)
        self._damaged: set[str] = set()
        """Checkpoints that `newest` has passed over, and that are there still."""

    def put(self, checkpoint: Checkpoint, parameters: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> str:
        """Keep the checkpoint of a report; its path in the run directory.

        Old ones go, and so do those of later steps that `newest` has found damaged. Others of later steps stay: the
        trial has gone on elsewhere, as where this seat is cut off from the cluster, but not from the run directory.

        Args:
            parameters: of the trial, as it was proposed.
            reports: all that it has reported, this one last.

        Raises:
            OSError: there is no room, or no right to write.
        """
        name = _checkpoint_folder(step_of(checkpoint))
        path = self._write(name, checkpoint, parameters, reports)
        self._damaged.discard(name)
        self._let_go(_place(name), self._damaged)
        return path

    def put_unreported(self, checkpoint: Checkpoint, parameters: Mapping[str, Any] | None) -> str:
        """Keep a checkpoint as the trial stands, between two reports or at one; its path in the run directory.

        One that is there already stays, if it is not damaged. So do those of later steps, of which the trial had
        reported more than now: the host that keeps this one may not know that it has gone on elsewhere.

        Raises:
            OSError: there is no room, or no right to write.
        """
        step = step_of(checkpoint)
        name = _checkpoint_folder(step)
        _, reports = self._told_by(step)
        if TRIAL in self._folder.below(name).names():
            try:
                self._saved(name)
            except DAMAGED:
                self._folder.remove(name)
            else:
                return f"{self._path}/{name}"
        path = self._write(name, checkpoint, parameters, reports)
        self._let_go(_place(name))
        return path

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole; None where there never was one.

        One of which the disk cannot read a part (EIO) is passed over where it can read all of another.

        Raises:
            OSError: they cannot be read now, which says nothing of them.
        """
        damaged: list[str] = []
        unreadable: OSError | None = None
        self._damaged.clear()
        for name in reversed(self._names()):
            try:
                return replace(self._saved(name), damaged=tuple(damaged))
            except DAMAGED as error:
                damaged.append(str(error))
                self._damaged.add(name)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                damaged.append(f"{self._folder.below(name).place}: the checkpoint cannot be read: {error}")
                self._damaged.add(name)
                unreadable = unreadable or error
        if unreadable is not None:
            raise unreadable
        return Saved(None, None, (), tuple(damaged)) if damaged else None

    def _saved(self, name: str) -> Saved:
        """One of the checkpoints.

        Raises:
            SweepError, MISSING, ValueError: it is damaged.
            OSError: it cannot be read now.
        """
        folder = self._folder.below(name)
        checkpoint = read_checkpoint(folder)
        if REPORTS not in folder.names():
            return Saved(checkpoint, *self._told_by(step_of(checkpoint)))
        told = _told(folder)
        return Saved(checkpoint, told["parameters"], told["reports"])

    def clear(self) -> None:
        """Remove all checkpoints: they are another trial's, that has had this number."""
        for name in self._names():
            self._folder.remove(name)

    def _write(
        self,
        name: str,
        checkpoint: Checkpoint,
        parameters: Mapping[str, Any] | None,
        reports: Sequence[Mapping[str, Any]],
    ) -> str:
        told = {"parameters": parameters, "reports": list(reports)}
        content = json.dumps({**told, "sha256": _digest(told)}).encode()
        write_checkpoint({REPORTS: content, **checkpoint}, self._folder.below(name))
        return f"{self._path}/{name}"

    def _let_go(self, new: tuple[int, str], damaged: Collection[str] = ()) -> None:
        """All but the new checkpoint, and of those that are not damaged the later ones, and before it as KEPT allows.

        One that cannot go stays until the next time: NFS keeps a file that somebody reads, in its folder.
        """
        names = self._names()
        gone = [name for name in names if name in damaged]
        gone += [name for name in names if name not in damaged and _place(name) < new][: 1 - KEPT]
        for name in gone:
            with suppress(OSError):
                self._folder.remove(name)
                self._damaged.discard(name)

    def _told_by(self, step: int) -> tuple[Mapping[str, Any] | None, Sequence[dict[str, Any]]]:
        """What the newest checkpoint that tells anything does of the trial as it stood at a step.

        That checkpoint may be of a later step, and damaged: what it reports of later steps is to come again.
        """
        told = next(self._told(), None)
        if told is None:
            return None, ()
        return told["parameters"], [report for report in told["reports"] if report["step"] <= step]

    def _told(self) -> Iterator[dict[str, Any]]:
        """What the checkpoints tell of the trial, the newest first."""
        for name in reversed(self._names()):
            folder = self._folder.below(name)
            try:
                if REPORTS in folder.names():
                    yield _told(folder)
            except DAMAGED:
                continue

    def _names(self) -> list[str]:
        found = [name for name in self._folder.names() if name.startswith("checkpoint_")]
        return sorted(found, key=_place)


def _place(name: str) -> tuple[int, str]:
    """Of a checkpoint's folder among others: from step 1,000,000 on there are more digits."""
    return len(name), name


def _told(folder: Folder) -> dict[str, Any]:
    """What a REPORTS file says.

    Raises:
        SweepError: it is none.
    """
    try:
        told = json.loads(folder.read(REPORTS))
        parameters, reports = told["parameters"], told["reports"]
        is_whole = isinstance(parameters, dict | None) and isinstance(reports, list)
        is_whole = is_whole and all(isinstance(report, dict) and type(report["step"]) is int for report in reports)
        read = {"parameters": parameters, "reports": reports}
        is_whole = is_whole and told.get("sha256") in (None, _digest(read))  # those of before had none
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SweepError(f"{folder.place}: {REPORTS} is damaged: {error}") from None
    if not is_whole:
        raise SweepError(f"{folder.place}: {REPORTS} is damaged: it is not what was written")
    return read


def _checkpoint_folder(step: int) -> str:
    return f"checkpoint_{step:06d}"


def trial_folder(trial: int) -> str:
    """Of a trial, below `tune/`."""
    return f"trial-{trial:04d}"
