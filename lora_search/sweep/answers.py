"""What a host is asked and answers: calls of an actor, and what their errors mean to a sweep."""

from __future__ import annotations

from typing import Any

import ray

from lora_search.errors import HostFailed, SweepError


class HostLost(SweepError):
    """A host, or what it had answered, is no more; the message says why."""


class DataLost(HostLost):
    """The data went with the node that had prepared it."""


def is_done(answer: Any) -> bool:
    """Whether a call has been answered, or has failed."""
    ready, _ = ray.wait([answer], timeout=0)
    return bool(ready)


def why_failed(answer: Any) -> str | None:
    """Why a call failed; None where it has not been answered, or is done."""
    if not is_done(answer):
        return None
    try:
        ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        return f"{type(error.cause).__name__}: {error.cause}"
    except ray.exceptions.RayError as error:
        return _first_line(error)
    return None


def unwrap(reference: Any) -> Any:
    """`ray.get` that raises our own errors as they were raised, a loss as HostLost, and others as a SweepError."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ray.exceptions.ObjectLostError):
            raise DataLost(_first_line(cause)) from None
        if isinstance(cause, HostFailed):
            raise HostLost(str(cause)) from None
        if isinstance(cause, SweepError):
            raise type(cause)(str(cause)) from None
        raise SweepError(f"{type(cause).__name__}: {cause}") from error
    except ray.exceptions.ObjectLostError as error:
        raise DataLost(_first_line(error)) from error
    except ray.exceptions.RayError as error:
        raise HostLost(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
