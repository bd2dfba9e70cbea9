"""From Ray Tune's callbacks to our observers, in our words."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from lora_search.errors import TrialFailed
from lora_search.space import trial_config
from lora_search.spec import SweepSpec
from lora_search.tracking.events import Observer, State

logger = logging.getLogger(__name__)

REPORT_KEYS = (
    "step",
    "steps_total",
    "eval_loss",
    "perplexity",
    "token_accuracy",
    "train_loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_second",
    "seconds",
    "peak_memory_bytes",
    "trainable_parameters",
    "host",
    "history",
)
"""What of Tune's result dict is ours; the rest (hostname, pid, date, ...) is Tune's."""


class Relay(Callback):  # type: ignore[misc]  # Ray's base class is untyped
    """Tells every observer what happens. One that raises is told no more, and the sweep goes on without it."""

    def __init__(self, spec: SweepSpec, folder: Path, observers: Sequence[Observer]) -> None:
        self._spec = spec
        self._folder = folder.resolve()
        self._observers = list(observers)
        self._started: set[int] = set()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._tell(lambda observer: observer.tick())

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        number, params = trial.config["trial"], trial.config["params"]
        if number not in self._started:
            self._started.add(number)
            parameters = trial_config(self._spec, params).parameters() | params
            self._tell(lambda observer: observer.trial_started(number, parameters))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        report = {key: result[key] for key in REPORT_KEYS if key in result}
        self._tell(lambda observer: observer.trial_reported(trial.config["trial"], report))

    def on_checkpoint(self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: Any, **info: Any) -> None:
        path = Path(checkpoint.path)
        relative = path.relative_to(self._folder) if path.is_relative_to(self._folder) else path
        step = int(trial.last_result["step"])
        self._tell(lambda observer: observer.trial_saved(trial.config["trial"], step, relative.as_posix()))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        result = trial.last_result
        done = result.get("step", 0) >= result.get("steps_total", 1)
        self._ended(trial, "completed" if done else "stopped", None)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ended(trial, "failed", failure_reason(trial))

    def _ended(self, trial: Trial, state: State, reason: str | None) -> None:
        self._tell(lambda observer: observer.trial_ended(trial.config["trial"], state, reason))

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
    return message if cause.endswith(TrialFailed.__name__) else f"{cause.rpartition('.')[2]}: {message}"
