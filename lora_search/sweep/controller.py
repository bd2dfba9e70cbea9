"""Ray Tune's control loop, with seats that are light, and kept while they start."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import ray
from ray._private.state import state
from ray.actor import ActorClass
from ray.air.execution import ResourceRequest
from ray.air.execution._internal import RayActorManager, TrackedActor
from ray.air.execution._internal.tracked_actor_task import TrackedActorTask
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune import tune as tune_module
from ray.tune.error import TuneError, _TuneStopTrialError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

from lora_search.errors import HostGone
from lora_search.seat import PROPOSED, Seat

_SEAT = ray.remote(Seat)

NODE_LABEL = "ray.io/node-id"
"""Ray gives it to every node."""


class SeatsTrials(Protocol):
    """What seats need of the hosts that they ask."""

    @property
    def capacity(self) -> int:
        """Trials that may run at once, as it stands; above zero."""
        ...

    @property
    def barred(self) -> Collection[str]:
        """The nodes on which no seat may be, as it stands."""
        ...

    def lost(self, trial: int, host: str, why: str) -> None:
        """A trial cannot go on with the host of that name."""
        ...

    def vacate(self, trial: int, attempt: int) -> None:
        """A trial's seat is no more: its place is free, and its next attempt may be far off."""
        ...


@contextmanager
def seated(hosts: SeatsTrials, /, **given: Any) -> Iterator[None]:
    """Have the trials of `tune.run` sit on seats, whatever trainable it is told of.

    Args:
        given: what every seat is made with, besides its first trial.
    """
    tune_module.TuneController = partial(_Controller, hosts, given)  # tune.run takes no control loop as an argument
    try:
        yield
    finally:
        tune_module.TuneController = TuneController


class _Controller(TuneController):  # type: ignore[misc]  # Ray's base class is untyped
    """Has seats for actors.

    As many start side by side as there is room for: Tune's way with a searcher is one by one. An ended trial's seat
    waits for the next trial, where all others have seats that start. Tune gives it to one of those, throws away the
    process that was starting for that one, and starts another for the next trial (Ray 2.60). Where trials last no
    longer than a process takes to start, it does so to the sweep's end.
    """

    def __init__(self, hosts: SeatsTrials, given: Mapping[str, Any], **told: Any) -> None:
        super().__init__(**told)
        self._hosts = hosts
        seats = _Seats(self._actor_manager._resource_manager)
        seats.barred, seats.given = (lambda: hosts.barred), given
        self._actor_manager: _Seats = seats

    def step(self) -> None:
        self.update_max_pending_trials(self._hosts.capacity)  # they come and go
        self._actor_manager.look_elsewhere()
        super().step()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        del state["_hosts"]  # what Tune saves of a run is data
        return state

    def _process_trial_failure(self, trial: Trial, exception: TuneError | RayTaskError | RayActorError) -> None:
        """What the searcher or the record raises as a trial ends is the sweep's: Tune holds it against the trial."""
        if isinstance(exception, _TuneStopTrialError) and (raised := sys.exception()) is not None:
            raise raised
        if isinstance(lost := getattr(exception, "cause", None), HostGone):
            self._hosts.lost(trial.config["trial"], lost.host, lost.why)
        self._hosts.vacate(trial.config["trial"], trial.config["attempt"])
        super()._process_trial_failure(trial, exception)

    def _maybe_cache_trial_actor(self, trial: Trial) -> bool:
        """A seat is not for another trial where none may begin."""
        seat = self._trial_to_actor.get(trial)
        if seat is not None and self._actor_manager.is_barred(seat):
            return False
        kept: bool = super()._maybe_cache_trial_actor(trial)
        return kept

    def _maybe_reuse_cached_actor(self, trial: Trial) -> bool:
        own = self._trial_to_actor.get(trial)
        starts = own is not None and self._actor_manager.is_actor_started(own)  # has its resources, and a process
        if starts and not self._search_alg.searcher.exhausted:
            return False
        cached, request = self._actor_cache, trial.placement_group_factory
        while cached.has_cached_object(request) and self._actor_manager.is_barred(cached._cached_objects[request][0]):
            self._remove_actor(tracked_actor=cached.pop_cached_object(request))
        reused: bool = super()._maybe_reuse_cached_actor(trial)
        return reused


class _Seats(RayActorManager):  # type: ignore[misc]  # Ray's base class is untyped
    """Makes a Seat where Tune makes an actor of the trainable, and tells it of the trial alone.

    What Tune passes besides (where logs and its own checkpoints go) is of Ray Tune's classes, which the seat's process
    would have to import to receive it.
    """

    barred: Callable[[], Collection[str]]
    given: Mapping[str, Any]
    """What every seat is made with, besides its first trial. No argument: `cleanup` calls the constructor again."""

    def add_actor(
        self, cls: ActorClass, kwargs: Mapping[str, Any], resource_request: ResourceRequest, **told: Any
    ) -> TrackedActor:
        seat = {**self.given, "config": _proposal(kwargs["config"])}
        return super().add_actor(_SEAT, seat, self._elsewhere(resource_request), **told)

    def _elsewhere(self, request: ResourceRequest) -> ResourceRequest:
        """As much, on no node that is barred now."""
        barred = ",".join(sorted(self.barred()))
        where = {"bundle_label_selector": [{NODE_LABEL: f"!in({barred})"}]} if barred else {}
        return ResourceRequest(request.bundles, **where)

    def is_barred(self, seat: TrackedActor) -> bool:
        """Whether a seat that has begun is on a node on which none may be by now."""
        barred = self.barred()
        if not barred or seat not in self._live_actors_to_ray_actors_resources:
            return False
        actor, _ = self._live_actors_to_ray_actors_resources[seat]
        return state.actor_table(actor._actor_id.hex()).get("Address", {}).get("NodeID") in barred

    def look_elsewhere(self) -> None:
        """Ask anew for seats that have no place yet, where other nodes are barred by now.

        What was asked for before might wait for ever: for nodes that have gone, while the new ones were not known yet.
        """
        for seat, (cls, kwargs, before) in list(self._pending_actors_to_attrs.items()):
            if (now := self._elsewhere(before)) != before:
                self._resource_request_to_pending_actors[before].remove(seat)
                self._resource_manager.cancel_resource_request(before)
                self._pending_actors_to_attrs[seat] = cls, kwargs, now
                self._resource_request_to_pending_actors[now].append(seat)
                self._resource_manager.request_resources(now)

    def _actor_task_failed(self, tracked_actor_task: TrackedActorTask, exception: Exception) -> None:
        """A seat that was ended where memory was short is lost as any other: to Ray that is of another class (2.60)."""
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            first = str(exception).strip().partition("\n")[0]  # then comes what Ray advises
            exception = RayActorError(error_msg=f"{type(exception).__name__}: {first}")
        super()._actor_task_failed(tracked_actor_task, exception)

    def schedule_actor_task(
        self,
        tracked_actor: TrackedActor,
        method_name: str,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        **told: Any,
    ) -> ray.ObjectRef | None:
        if method_name == "reset":
            args, kwargs = (_proposal(args[0]),), {}
        return super().schedule_actor_task(tracked_actor, method_name, args, kwargs, **told)


def _proposal(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a trial's config is the searcher's."""
    return {key: config[key] for key in PROPOSED}
