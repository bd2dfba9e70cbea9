"""SIGTERM, a spot machine's warning, taken as SIGINT is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lora_search.errors import Interrupted


def sigterm_as_sigint() -> AbstractContextManager[None]:
    """Let SIGTERM raise what SIGINT raises: KeyboardInterrupt."""
    return _handled(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def sigterm_interrupts(place: str) -> Iterator[None]:
    """Let SIGTERM do what SIGINT does; inside Ray's calls nothing but that one's exception would come through.

    Args:
        place: of the run directory.

    Raises:
        Interrupted: by either; the sweep can be resumed.
    """
    try:
        with sigterm_as_sigint():
            yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; the sweep is in {place}, and the same command with --resume goes on") from None


@contextmanager
def sigterm_kept_from_ray() -> Iterator[None]:
    """Keep what SIGTERM does while Ray starts, which puts a handler of its own there: it exits, and leaves no word.

    Raises:
        KeyboardInterrupt: the signal came while Ray's handler was there.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if _in_main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def sigterm_ends_tune() -> Iterator[None]:
    """Let SIGTERM end Ray Tune's loop as cleanly as SIGINT does.

    Tune catches SIGINT and SIGUSR1 alone, each of which ends its loop after the current event; before it does,
    SIGUSR1 would kill, and after it has, SIGINT would do nothing.
    """
    with (
        _handled(signal.SIGINT, signal.getsignal(signal.SIGINT)),
        _handled(signal.SIGUSR1, signal.default_int_handler),
        _handled(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGUSR1)),
    ):
        yield


@contextmanager
def _handled(number: int, handler: Callable[[int, Any], Any] | int | None) -> Iterator[None]:
    """Nothing is done in other threads than the first, which alone may say what signals do."""
    if not _in_main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
