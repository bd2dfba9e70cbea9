"""From Ray Tune's callbacks to our observers, in our words."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from lora_search.results import Row
from lora_search.results.events import FIGURES
from lora_search.space import trial_config
from lora_search.spec import SweepSpec
from lora_search.tracking.events import Observer, State

logger = logging.getLogger(__name__)

REPORT_KEYS = ("step", *FIGURES, "history")
"""What of a seat's result is its trial's report."""


class Relay(Callback):  # type: ignore[misc]  # Ray's base class is untyped
    """Tells every observer what happens. One that raises is told no more, and the sweep goes on without it."""

    def __init__(
        self,
        spec: SweepSpec,
        observers: Sequence[Observer],
        past: Sequence[Row] = (),
        retries: Callable[[int], bool] = lambda trial: False,
        unsaved: Callable[[int, str, str | None], None] = lambda trial, why, node: None,
    ) -> None:
        """
        Args:
            past: rows of the trials that earlier processes have run.
            retries: whether a trial whose machine was lost is tried again.
            unsaved: told of a trial why its seat cannot use the run directory, and on which node that is so.
        """
        self._retries, self._unsaved = retries, unsaved
        self._spec = spec
        self._observers = list(observers)
        self._steps = {int(row["trial"]): int(row["steps"]) for row in past}
        """Of each trial that has been told of, the last step that has been."""
        self._lost = {int(row["trial"]) for row in past if row["state"] == "running"}
        """Trials whose seat or process was lost, and of which nobody has been told yet that they go on."""

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._tell(lambda observer: observer.tick())

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._started(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if "unsaved" in result:
            self._unsaved(trial.config["trial"], result["unsaved"], result["node"])
            return
        number, step = trial.config["trial"], result["step"]
        resumed = result.get("resumed")
        if resumed is not None or number in self._lost:
            self._lost.discard(number)
            parameters, where = self._parameters(trial), resumed or {"step": 0, "damaged": []}
            self._tell(lambda observer: observer.trial_resumed(number, parameters, **where))
        if "failure" in result or step <= self._steps[number]:
            return  # what is reported again has been told
        self._steps[number] = step
        report = {key: result[key] for key in REPORT_KEYS if key in result}
        self._tell(lambda observer: observer.trial_reported(number, report))
        if "checkpoint" in result:
            self._tell(lambda observer: observer.trial_saved(number, step, result["checkpoint"]))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        result = trial.last_result
        if "failure" in result:
            self._ended(trial, "failed", result["failure"])
        else:
            done = result.get("step", 0) >= result.get("steps_total", 1)
            self._ended(trial, "completed" if done else "stopped", None)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        number = trial.config["trial"]
        if self._retries(number):
            self._lost.add(number)
            return
        tried = self._spec.hosts.max_retries
        self._ended(trial, "failed", (f"given up after {tried} retries: " if tried else "") + failure_reason(trial))

    def _started(self, trial: Trial) -> None:
        number = trial.config["trial"]
        if number not in self._steps:
            self._steps[number] = 0
            parameters = self._parameters(trial)
            self._tell(lambda observer: observer.trial_started(number, parameters))

    def _ended(self, trial: Trial, state: State, reason: str | None) -> None:
        self._started(trial)  # it may have been lost before that
        self._tell(lambda observer: observer.trial_ended(trial.config["trial"], state, reason))

    def _parameters(self, trial: Trial) -> dict[str, Any]:
        return trial_config(self._spec, trial.config["params"]).parameters() | dict(trial.config["params"])

    def _tell(self, event: Callable[[Observer], None]) -> None:
        for observer in list(self._observers):
            try:
                event(observer)
            except Exception:
                if observer.essential:
                    raise
                logger.exception("%s failed and is told no more", type(observer).__name__)
                self._observers.remove(observer)


def failure_reason(trial: Trial) -> str:
    """The message of what ended a trial, without Ray's wrapping and traceback.

    From the text that Tune keeps beside the pickled error: its last line is `module.Class: message`.
    """
    try:
        lines = Path(trial.error_file).read_text(encoding="utf-8").strip().splitlines()
    except (OSError, TypeError):
        return "unknown: Ray Tune kept no error of it"
    cause, _, message = lines[-1].partition(": ") if lines else ("", "", "")
    return f"{cause.rpartition('.')[2]}: {message}"
