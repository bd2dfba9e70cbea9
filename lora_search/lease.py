"""A lock in an object store, or on a file system without locks: what its holder writes anew every few seconds.

Its age is told by the store's clock alone, from an object written for that: machines need not agree on the time. On a
file system it is watched until it changes.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

from lora_search.errors import InputError
from lora_search.storage import Folder, is_uri

logger = logging.getLogger(__name__)

LEASE = ".lease"

REFRESH_S = 3.0

LEASE_S = 15.0
"""One that has not been refreshed for so long is nobody's any more."""

LOOK_S = 0.5
"""Between two looks at somebody else's."""

LONG_AGO = timedelta(days=1)
"""By any two clocks, however wrong, a lease of before then is nobody's."""

SETTLE_S = 1.0
"""Of two processes that take a lease at once, the one that wrote last has it; so long a write takes at most."""


@contextmanager
def leased(folder: Folder) -> Iterator[Callable[[], bool]]:
    """Hold the lease of a folder, and yield a function that says whether it is held still.

    Waits LEASE_S at most, where its last holder was killed not long ago.

    Raises:
        InputError: another process holds it.
    """
    mine = uuid.uuid4().hex.encode()
    _wait_until_free(folder)
    folder.write(LEASE, mine)
    time.sleep(SETTLE_S)
    if folder.read(LEASE) != mine:
        raise _held(folder)
    ended, lost = threading.Event(), threading.Event()
    thread = threading.Thread(target=_refresh, args=(folder, mine, ended, lost), name="lease", daemon=True)
    thread.start()
    try:
        yield lambda: not lost.is_set()
    finally:
        ended.set()
        thread.join()
        if not lost.is_set():
            with suppress(OSError):  # then it ends by itself
                folder.remove(LEASE)


def is_leased(folder: Folder) -> bool:
    """Whether some process holds the lease of a folder now. Only reads.

    It watches whether the lease is refreshed, REFRESH_S as a rule; LEASE_S, where its last holder was killed.

    Raises:
        StoreError: the store fails.
    """
    found = folder.modified(LEASE)
    if found is None or datetime.now(UTC) - found > LONG_AGO:
        return False
    end = time.monotonic() + LEASE_S
    while time.monotonic() < end:
        time.sleep(LOOK_S)
        if not is_uri(folder.place):
            with suppress(OSError):
                folder.read(LEASE)  # NFS asks its server anew when a file is opened
        now = folder.modified(LEASE)
        if now != found:
            return now is not None
    return False


def _wait_until_free(folder: Folder) -> None:
    if not is_uri(folder.place):  # whose files may be dated by the machines that write them
        if is_leased(folder):
            raise _held(folder)
        return
    found = folder.modified(LEASE)
    probe = f"{LEASE}-{uuid.uuid4().hex}"
    while found is not None:
        folder.write(probe, b"")
        now = folder.modified(probe)
        folder.remove(probe)
        if now is None or (now - found).total_seconds() > LEASE_S:
            return
        time.sleep(1)
        before, found = found, folder.modified(LEASE)
        if found is not None and found != before:
            raise _held(folder)


def _refresh(folder: Folder, mine: bytes, ended: threading.Event, lost: threading.Event) -> None:
    while not ended.wait(REFRESH_S):
        try:
            if folder.read(LEASE) != mine:
                lost.set()
                return
            folder.write(LEASE, mine)
        except FileNotFoundError:  # another had it since, and has ended
            lost.set()
            return
        except OSError as error:
            logger.warning("the lease is not refreshed: %s", error)


def _held(folder: Folder) -> InputError:
    return InputError(f"{folder.place}: another lora-search run is writing to it")
