"""A folder that appears complete, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    folder = out.with_name(f".{out.name}.merging")
    lock = FileLock(folder / LOCK)
    _require_free(out)
    try:
        _lock(folder, lock)
    except Timeout:
        raise SweepError(f"{out}: another process is merging to it") from None
    except OSError as error:
        raise SweepError(f"{out}: cannot be made: {error.strerror or error}") from None
    try:
        _require_free(out)
        _empty(folder)
        yield folder
    finally:
        _empty(folder)
        (folder / LOCK).unlink(missing_ok=True)  # held until here: whoever comes next makes one of its own
        with suppress(OSError):  # whoever comes next has
            folder.rmdir()
        lock.release()


def _require_free(out: Path) -> None:
    if out.exists():
        raise SweepError(f"{out} exists already")


def _lock(folder: Path, lock: FileLock) -> None:
    """Make the folder and take its lock; again where the one who is done removes the folder in between."""
    for last in (False,) * 9 + (True,):
        try:
            folder.mkdir(exist_ok=True)
            lock.acquire(timeout=0)
            return
        except (FileNotFoundError, FileExistsError):
            if last:
                raise


def _empty(folder: Path) -> None:
    for leftover in folder.iterdir():
        if leftover.name != LOCK:
            shutil.rmtree(leftover, ignore_errors=True)


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
