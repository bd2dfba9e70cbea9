"""The job that a command runs in: of Ray (`ray job submit`), whose folders go with it; of a scheduler, by its name."""

from __future__ import annotations

import os
from pathlib import Path

from lora_search.errors import InputError
from lora_search.storage import is_uri

VARIABLE = "RAY_ADDRESS"
"""Of the environment. Ray sets it for a job's command."""

LOCAL = "local"
"""The address that asks for a Ray of one's own, as in `ray.init`."""

SCHEDULED = "LORA_SEARCH_JOB"
"""Of the environment. Names the scheduler's job, as one that may be started again."""

COPY = "_ray_pkg_"
"""How the folder's name begins into which Ray (2.60) unpacks a job's working directory, on every node."""


def cluster_address(given: str | None) -> tuple[str | None, str]:
    """The Ray cluster to use, and where that was said; None where one is to be started on this machine.

    Args:
        given: with `--address`; None or `auto`: what RAY_ADDRESS says, where it says anything.

    Raises:
        InputError: it is a URL: a sweep runs on a node of the cluster.
    """
    said = os.environ.get(VARIABLE, "")
    if said.startswith(("http://", "https://")):  # where `ray job submit` finds the job server
        said = ""
    source, found = (VARIABLE, said) if said and given in (None, "auto") else ("--address", given or LOCAL)
    if "://" in found:
        raise InputError(
            f"{source}: found {found!r}; allowed: HOST:PORT of a cluster's head, auto, or {LOCAL}, on a node of it; "
            "from elsewhere, `ray job submit` runs a command there"
        )
    return (None if found == LOCAL else found), source


def scheduled_job() -> str | None:
    """What no other job is called, and this one again when it is started again; None where nobody has said so."""
    return os.environ.get(SCHEDULED) or None


def refuse_passing_output(output: str) -> None:
    """
    Raises:
        InputError: a sweep's output lies in a job's copy of its working directory.
    """
    if not is_uri(output) and _in_copy(str(Path(output).expanduser().resolve())):
        raise InputError(
            f"output: found {output!r}, which lies in the job's copy of its working directory, and is lost with it; "
            "allowed: a folder or bucket that all nodes see, as in --set output=/shared/runs"
        )


def lasting(value: object) -> object:
    """A value of a sweep file, of which it says no more where a job's copy of its working directory lies.

    Each version of a working directory has a copy of its own, so that one file has many paths.
    """
    if not isinstance(value, str) or not _in_copy(value):
        return value
    parts = Path(value).parts
    copy = next(place for place, part in enumerate(parts) if part.startswith(COPY))
    return str(Path(*parts[copy + 1 :]))


def _in_copy(path: str) -> bool:
    return any(part.startswith(COPY) for part in Path(path).parts)
