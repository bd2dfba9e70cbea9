"""SIGTERM, a spot machine's warning, taken as SIGINT is."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_search.errors import Interrupted


@contextmanager
def sigterm_interrupts(place: str) -> Iterator[None]:
    """Let SIGTERM raise what SIGINT raises; inside Ray's calls nothing else would come through.

    Begins when Ray has started, for Ray puts a handler of its own there, which aborts.

    Args:
        place: of the run directory.

    Raises:
        Interrupted: by either; the sweep can be resumed.
    """
    try:
        with _on_sigterm(signal.default_int_handler):
            yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; the sweep is in {place}, and the same command with --resume goes on") from None


def sigterm_ends_tune() -> Any:
    """Let SIGTERM end Ray Tune's loop as cleanly as SIGINT does.

    Tune catches SIGINT and SIGUSR1 alone; each ends its loop after the current event.
    """
    return _on_sigterm(lambda number, frame: signal.raise_signal(signal.SIGUSR1))


@contextmanager
def _on_sigterm(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
