"""Schedulers: ASHA by optimiser steps, whose rung records survive the end of the process, and none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from lora_search.space import first_rung
from lora_search.spec import SweepSpec


class _Numbered(NamedTuple):
    """All that the scheduler looks at of a trial. Ray Tune's own ids are drawn anew by every process."""

    trial_id: str


class InOrder(FIFOScheduler):  # type: ignore[misc]  # Ray's base class is untyped
    """Trials begin in the order of their proposal, and none is stopped early."""

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """Leave it to Ray Tune, which begins what is pending; FIFOScheduler looks at all trials, at every event."""


class StepAsha(InOrder, AsyncHyperBandScheduler):  # type: ignore[misc]  # Ray's base class is untyped
    """Ray Tune's asynchronous successive halving (arXiv:1810.05934), which knows trials by our numbers.

    Ray does not save a scheduler: after a restore it has forgotten every score, and lets through what it would have
    stopped (sisinflab/warprec#126). Here the records follow from trials.jsonl, told again in its order.
    """

    def __init__(self, spec: SweepSpec) -> None:
        super().__init__(
            time_attr="step",
            metric=spec.search.metric,
            mode=spec.search.mode,
            max_t=spec.max_steps,
            grace_period=first_rung(spec),
            reduction_factor=spec.search.scheduler.reduction_factor,
        )
        self._stopped: set[str] = set()

    def replay(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Learn what was decided before, from the events of trials.jsonl."""
        last: dict[int, Mapping[str, Any]] = {}
        for event in events:
            number, trial = event["trial"], _Numbered(str(event["trial"]))
            if event["event"] == "start":
                super().on_trial_add(None, trial)
            elif event["event"] == "report" and event[self._metric] is not None:
                last[number] = event
                if event["step"] < event["steps_total"]:
                    self._decide(trial, event)
            elif event["event"] == "end" and number in last:
                super().on_trial_complete(None, trial, last[number])

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, _numbered(trial))

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if "unsaved" in result:  # a seat's last word, though its trial goes on
            return str(TrialScheduler.CONTINUE)
        return self._decide(_numbered(trial), result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, _numbered(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_remove(tune_controller, _numbered(trial))

    def _decide(self, trial: _Numbered, result: Mapping[str, Any]) -> str:
        """A decision to stop stands: what was reported before it could be carried out may be reported again."""
        if trial.trial_id in self._stopped:
            return str(TrialScheduler.STOP)
        decision = str(super().on_trial_result(None, trial, result))
        if decision == TrialScheduler.STOP:
            self._stopped.add(trial.trial_id)
        return decision


def _numbered(trial: Trial) -> _Numbered:
    return _Numbered(str(trial.config["trial"]))
