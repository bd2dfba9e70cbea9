"""What a host is asked and answers: calls of an actor, and what their errors mean to a sweep."""

from __future__ import annotations

from typing import Any

import ray

from lora_search.errors import HostFailed, SweepError
from lora_search.seat import GONE, first_line, why_lost


class HostLost(SweepError):
    """A host, or what it had answered, is no more; the message says why."""


class DataLost(HostLost):
    """The data went with the node that had prepared it."""


class NodeUnready(HostLost):
    """A host is of no use, but another on its node may be, later; the message says what is wrong with the node."""


class NodeUnfit(HostLost):
    """A host is of no use, and no other on its node ever will be; the message says what is wrong with the node."""


NOT_INSTALLED = ("ModuleNotFoundError", "ImportError", "AttributeError")
"""How what Python says begins of a package that is not there, or is another version."""

LOST_BEFORE = (ray.exceptions.ObjectLostError, *GONE)
"""Of a call whose arguments were to come from a host that is no more."""


def is_done(answer: Any) -> bool:
    """Whether a call has been answered, or has failed."""
    ready, _ = ray.wait([answer], timeout=0)
    return bool(ready)


def unwrap(reference: Any) -> Any:
    """`ray.get` that raises our own errors as they were raised, a loss as HostLost, and others as a SweepError.

    Where no host can be made, since this package is not there, that is its node's fault: NodeUnfit.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, LOST_BEFORE):
            raise DataLost(first_line(cause)) from None
        if isinstance(cause, HostFailed):
            raise HostLost(str(cause)) from None
        if isinstance(cause, SweepError):
            raise type(cause)(str(cause)) from None
        what = first_line(cause) if isinstance(cause, ray.exceptions.RayError) else str(cause)  # then a traceback
        raise SweepError(f"{type(cause).__name__}: {what}") from error
    except ray.exceptions.ObjectLostError as error:
        raise DataLost(first_line(error)) from error
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[-1]
        if getattr(error, "actor_init_failed", False) and last.startswith(NOT_INSTALLED):
            raise NodeUnfit(f"no host can be made there: {last}") from error
        raise HostLost(why_lost(error)) from error


def failure(reference: Any) -> SweepError | None:
    """What a call has failed with, as `unwrap` raises it; None where it has not. Waits for it."""
    try:
        unwrap(reference)
    except SweepError as error:
        return error
    return None
