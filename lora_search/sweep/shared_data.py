"""The data of a sweep: prepared by one host for all of them, and by another one where they went with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from lora_search.errors import SweepError
from lora_search.placement import HostPlace
from lora_search.sweep.answers import DataLost, HostLost, NodeUnfit, unwrap
from lora_search.sweep.running import Prepared, RunningHost

Work = Callable[[HostPlace], tuple[Any, Any]]
"""Prepares the data on a host, given its place: what is said of them, and the data."""


class SharedData:
    """What hosts load the base for. The tokens stay in Ray's object store; the driver knows what is said of them."""

    def __init__(self) -> None:
        self._work: Work
        self._said: Any = None
        """Of the data that the sweep began with."""
        self._newest: Prepared | None = None

    def begin(self, host: RunningHost, work: Work) -> None:
        """Have a host prepare them."""
        self._work = work
        self._prepare(host)

    def said(self) -> Any:
        """What the host says of them that prepares them first; waits for it.

        Raises:
            InputError, SweepError: as the host said.
        """
        assert self._newest is not None  # noqa: S101 - it has begun
        self._said = unwrap(self._newest.said)
        return self._said

    def load(self, host: RunningHost, check: Callable[[], None] | None) -> None:
        """Have a host load the base for them, unless it does so already.

        Args:
            check: what it has to pass before any trial is let in.
        """
        if host.loading is None:
            host.given = self._newest
            host.loading = host.actor.load.remote(host.given and host.given.data, check)

    def loaded(self, host: RunningHost) -> None:
        """Wait until a host has loaded the base.

        Raises:
            DataLost: there are no data for it; they are prepared anew, and it has to load again.
            HostLost: it was to prepare them, and cannot; NodeUnfit where its node has other ones.
            InputError, SweepError: as the host said.
        """
        given, failed = host.given, None
        ready: dict[str, Any] = {}
        try:
            ready = unwrap(host.loading)
        except SweepError as error:
            failed = error
        if failed is None:
            host.is_loaded(ready)
            return
        wrong = given and given.wrong()
        if wrong is None and not isinstance(failed, DataLost):
            raise failed
        if wrong is not None and given is not None and given.by == host.place.name:
            if isinstance(wrong, NodeUnfit):
                raise wrong
            raise HostLost(f"the data cannot be prepared there: {wrong}") from failed
        self.renew(host)
        raise DataLost(str(wrong or failed)) from failed

    def renew(self, host: RunningHost) -> None:
        """Have a host load again whose data are no more, and prepare them for all, unless another does so already."""
        host.loaded, host.loading = False, None
        if self._newest is host.given:
            self._prepare(host)

    def for_work(self, host: RunningHost) -> Any:
        """The data, for other work on a host that has loaded the base; waits while they are prepared anew."""
        if self._newest is not None:
            ray.wait([self._newest.said])
            if self._newest.wrong() is None:
                host.given = self._newest
        return host.given and host.given.data

    def _prepare(self, host: RunningHost) -> None:
        said, data = host.actor.run.options(num_returns=2).remote(_prepare_like, self._work, host.place, self._said)
        self._newest = Prepared(host.place.name, said, data)


def _prepare_like(work: Work, place: HostPlace, like: Any) -> tuple[Any, Any]:
    """Prepare the data on a host.

    Args:
        like: what was said of those that the sweep began with; None where it has not begun.

    Raises:
        NodeUnfit: these are others.
    """
    said, data = work(place)
    if like is not None and said != like:
        raise NodeUnfit("the data there are not those that the sweep began with")
    return said, data
