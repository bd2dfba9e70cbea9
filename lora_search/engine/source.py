"""The source of a base's code: transformers writes out anew for every architecture what they share."""

from __future__ import annotations

import inspect
from typing import Any


def source_of(function: Any) -> str | None:
    """None where there is none to be had: of code that has no file, or has been put into an object of another kind."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return None
