"""The cluster's head, without which nothing can be asked of Ray: a sweep whose head is lost ends with a word."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray
from ray._private import worker as ray_worker

ASK_EVERY_S = 5.0

ANSWER_S = 5.0

UNREACHED = "waiting for GCS to become available"
"""What Ray says where it has no connection to the head, as of one that is slow to answer it does not (2.60)."""

RAY_WAITS = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Ray ends a process, in the words of its parts, when it has not reached the head for so long; 60 s (2.60)."""

BEFORE_RAY_S = 25.0
"""So much less than Ray we wait, from our first failed call on, which may come later than Ray's; and ask every 10 s."""


@contextmanager
def ended_without_head(place: str) -> Iterator[None]:
    """End this process, with exit status 1, where the cluster's head is out of reach for long; not where it is slow.

    No exception would do: the thread that is to raise it waits in a call of Ray's, which nothing ends.

    Args:
        place: of the run directory. One in an object store is left as by SIGKILL; nothing was told for a while by then.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(place, ended), name="head", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(place: str, ended: threading.Event) -> None:
    patience_s = max(ASK_EVERY_S, float(os.environ.get(RAY_WAITS, 60)) - BEFORE_RAY_S)
    silent_since: float | None = None  # from a first call that failed: this process may have stood still before
    while not ended.wait(ASK_EVERY_S):
        if _is_reached():
            silent_since = None
        elif silent_since is None:
            silent_since = time.monotonic()
        elif time.monotonic() - silent_since > patience_s and not ended.is_set():
            _end(
                f"the Ray cluster's head has been out of reach for {patience_s:.0f} s; the sweep is in {place}, and "
                "the same command with --resume goes on when there is a cluster again"
            )


def _is_reached() -> bool:
    try:
        ray_worker.global_worker.gcs_client.check_alive([], ANSWER_S)
    except ray.exceptions.RpcError as error:
        return UNREACHED not in str(error)
    return True


def _end(why: str) -> None:
    """End this process at once, with one line, below the live view where there is one, which hides the cursor."""
    lead = "\n\x1b[?25h" if sys.stderr.isatty() else ""
    with suppress(OSError):
        print(f"{lead}lora-search: {why}", file=sys.stderr, flush=True)
    os._exit(1)
