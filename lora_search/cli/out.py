"""Where a command writes: `--out`."""

from __future__ import annotations

from pathlib import Path

from lora_search.errors import InputError
from lora_search.storage import is_uri


def local_path(out: str) -> Path:
    """The path that `--out` names.

    Raises:
        InputError: it is a URI, which would make a folder of that name here.
    """
    if is_uri(out):
        scheme = out.partition("://")[0]
        raise InputError(f"--out: found {scheme}://...; allowed: a path on this machine, from which it can be uploaded")
    return Path(out)
