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
def sigterm_for_this_process_alone() -> Iterator[None]:
    """Have no process that is started meanwhile hear SIGTERM, ever; in this thread it waits until then.

    A machine that goes down, systemd, Slurm and `timeout` send it to all processes at once, and with Ray's ended by it
    no trial could be saved.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def signals_end_tune() -> Iterator[threading.Event]:
    """Let SIGINT and SIGTERM end Ray Tune's loop after its current event; yields what is set as soon as either came.

    Tune is told by SIGUSR1, which would kill before Tune catches it, and does nothing in the seconds in which Tune
    ends. A second SIGINT does not wait for that. Tune's own handler of SIGINT is left out (TUNE_ENV).

    Raises:
        KeyboardInterrupt: Tune did not listen yet, or a second SIGINT came.
    """
    came = threading.Event()

    def end_tune(number: int, frame: Any) -> None:
        if came.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.set()
        signal.raise_signal(signal.SIGUSR1)

    with (
        _handled(signal.SIGUSR1, signal.default_int_handler),
        _handled(signal.SIGINT, end_tune),
        _handled(signal.SIGTERM, end_tune),
    ):
        yield came


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
