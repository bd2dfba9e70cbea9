"""Ray Tune's control loop, with seats that are kept while they start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.tune import tune as tune_module
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial


class _Controller(TuneController):  # type: ignore[misc]  # Ray's base class is untyped
    """Has an ended trial's seat wait for the next trial, where all others have seats that start.

    Tune gives it to one of those, throws away the process that was starting for that one, and starts another for the
    next trial (Ray 2.60). Where trials last no longer than a process takes to start, it does so to the sweep's end.
    """

    def _maybe_reuse_cached_actor(self, trial: Trial) -> bool:
        own = self._trial_to_actor.get(trial)
        starts = own is not None and self._actor_manager.is_actor_started(own)  # has its resources, and a process
        if starts and not self._search_alg.searcher.exhausted:
            return False
        reused: bool = super()._maybe_reuse_cached_actor(trial)
        return reused


@contextmanager
def starting_seats_kept() -> Iterator[None]:
    """Let `tune.run`, which takes no control loop as an argument, use this one."""
    tune_module.TuneController = _Controller
    try:
        yield
    finally:
        tune_module.TuneController = TuneController
