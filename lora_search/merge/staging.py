"""A folder that appears complete, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lora_search.errors import SweepError

LOCK = ".lock"


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to make it in; what a killed merge left there is removed, now or with the next one.

    Raises:
        SweepError: `out` exists, or another process is making it.
    """
    if out.exists():
        raise SweepError(f"{out} exists already")
    folder = out.with_name(f".{out.name}.merging")
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SweepError(f"{out}: another process is merging to it") from None
    try:
        for leftover in folder.iterdir():
            if leftover.name != LOCK:
                shutil.rmtree(leftover)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def publish(part: Path, out: Path) -> None:
    """Give a complete folder its name.

    Raises:
        SweepError: the name was taken meanwhile.
    """
    for file in part.rglob("*"):
        if file.is_file():
            _flush(file)
    _flush(part)
    if out.exists():
        raise SweepError(f"{out} exists already")
    part.rename(out)
    _flush(out.parent)


def _flush(path: Path) -> None:
    """Have the disk hold a file or a folder's names, as far as the file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # a file system that has no fsync of folders
    finally:
        os.close(descriptor)
