"""The one tree of errors. A message says what is wrong, where, what was found and what is allowed.

And how text that may be somebody else's is shown.
"""

from __future__ import annotations

OUT_OF_MEMORY = "out of memory"
"""How the reason begins of a trial that failed because it is too large for its device."""


class SweepError(Exception):
    """The sweep could not be carried out (exit status 1)."""


class InputError(SweepError):
    """The user's input is wrong (exit status 2); the message is complete and needs no traceback."""


class TrialFailed(SweepError):
    """One trial ended for a reason of its own, such as a loss that is not finite; the sweep goes on."""


class HostFailed(SweepError):
    """A host's device or process computes no longer; its trials go on elsewhere from their last checkpoints."""


class HostGone(SweepError):
    """A trial cannot go on with its host, whose name this has: it is lost, fails, or has no memory for it."""

    def __init__(self, host: str, why: str) -> None:
        super().__init__(host, why)
        self.host, self.why = host, why

    def __str__(self) -> str:
        return f"{self.host}: {self.why}"


class Interrupted(SweepError):
    """The sweep was told to stop, by SIGINT or SIGTERM, and has stopped cleanly (exit status 130)."""


def cell(text: str) -> str:
    """Text as a cell of a Markdown table holds it: one line, and no bar that would end the cell."""
    return harmless(" ".join(text.split())).replace("\\", "\\\\").replace("|", "\\|")


def harmless(text: str) -> str:
    """Text as a terminal may show it: what would steer the terminal is spelled out. Lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
