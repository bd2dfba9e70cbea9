"""Keeps a run directory in an object store up to date with the driver's copy, from a thread of its own."""

from __future__ import annotations

import atexit
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lora_search.errors import SweepError
from lora_search.lease import REFRESH_S
from lora_search.rundir import RECORDS, RunDirectory, fetch
from lora_search.storage import Folder
from lora_search.tracking import Observer

logger = logging.getLogger(__name__)

EVERY_S = 1.0

FIRST_S = REFRESH_S + 2.0
"""Before anything is uploaded: of two that took the lease at once, one knows by then that it has lost it."""

SHARE = 0.1
"""Of its time that the thread spends uploading, at most."""


@contextmanager
def kept_uploaded(run: RunDirectory, held: Callable[[], bool]) -> Iterator[None]:
    """Fetch what an earlier process left; upload what changes, as often as SHARE allows, and all of it at the end.

    Nothing is done where the run directory is on a file system.

    Args:
        held: whether the run directory is ours to write to.

    Raises:
        SweepError: another process has taken over the run directory.
        StoreError: the store fails at the end.
    """
    if run.uri is None:
        yield
        return
    fetch(run)
    uploads = _Uploads(run)
    ended = threading.Event()
    thread = threading.Thread(target=uploads.go_on, args=(ended, held), name="upload", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        require_held(run, held)
        uploads.changed(run.folder)
        if run.report.is_file():
            run.folder.write(run.report.name, run.report.read_bytes())
        atexit.register(_discard_copy, run)


def _discard_copy(run: RunDirectory) -> None:
    """Remove what the store has all of; what it has not, W&B's offline runs, stays where the user was told."""
    if not any(run.path.glob("wandb/offline-run-*")):
        shutil.rmtree(run.path.parent, ignore_errors=True)


class Held(Observer):
    """Ends the sweep where another process has taken over its run directory."""

    essential = True

    def __init__(self, run: RunDirectory, held: Callable[[], bool]) -> None:
        self._run, self._held = run, held

    def tick(self) -> None:
        require_held(self._run, self._held)


def require_held(run: RunDirectory, held: Callable[[], bool]) -> None:
    """
    Raises:
        SweepError: another process has taken over the run directory.
    """
    if not held():
        knew = "" if run.uri is None else f"; what this one knew is in {run.path}"
        raise SweepError(f"{run.place}: another lora-search run has taken over{knew}")


class _Uploads:
    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._seen: dict[str, tuple[int, int]] = {}
        """Of a file, size and time when it was uploaded."""

    def changed(self, folder: Folder) -> None:
        """Upload the records that have changed.

        The study last read is the first uploaded: it may know more than trials.jsonl, never less.

        Raises:
            StoreError: the store fails.
        """
        changed = []
        for name in RECORDS:
            file = self._run.path / name
            if file.exists():
                now = (file.stat().st_size, file.stat().st_mtime_ns)
                if self._seen.get(name) != now:
                    changed.append((name, now, file.read_bytes()))
        for name, now, content in reversed(changed):
            folder.write(name, content)
            self._seen[name] = now

    def go_on(self, ended: threading.Event, held: Callable[[], bool]) -> None:
        wait_s, folder = FIRST_S, Folder(self._run.folder.place, patience_s=0)
        while not ended.wait(wait_s):
            if not held():
                return
            began = time.monotonic()
            try:
                self.changed(folder)
            except OSError as error:  # the sweep goes on, and so do we; what stays wrong is told at the end
                logger.warning("not uploaded: %s", error)
            wait_s = max(EVERY_S, (time.monotonic() - began) / SHARE)
