"""Has Ray Tune run the trials of a sweep on its hosts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from lora_search.checkpoint import trial_folder
from lora_search.errors import Interrupted
from lora_search.results import Row, ended_count, run_rows
from lora_search.rundir import RunDirectory
from lora_search.search import StudySearcher, create_study
from lora_search.search.asha import InOrder, StepAsha
from lora_search.seat import SEAT_BYTES
from lora_search.space import planned_trials
from lora_search.spec import SweepSpec
from lora_search.sweep.cluster import Say
from lora_search.sweep.controller import seated
from lora_search.sweep.hosts import Hosts
from lora_search.sweep.provenance import read_provenance, write_provenance
from lora_search.sweep.resume import (
    Past,
    reconcile,
    shorter_trials,
)
from lora_search.sweep.roster import LOOK_EVERY_S
from lora_search.sweep.signals import signals_end_tune
from lora_search.tracking import Observer, RunRecord
from lora_search.tracking.relay import Relay

TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials.jsonl is the record
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # Tune's own state, which grows with the trials: once, at the end
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals_end_tune has its own
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a result may say why there is no metric
    "RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE": "1",  # else Tune puts such a trial on a seat again and tells nobody
}


def search(
    spec: SweepSpec,
    run: RunDirectory,
    hosts: Hosts,
    observers: Sequence[Observer] = (),
    say: Say = lambda line: None,
) -> list[Row]:
    """Run all trials of a sweep on its hosts, or those that are left of it; the rows of all.

    Raises:
        Interrupted: by a signal; what the running trials had come to is saved.
        SweepError: all hosts were lost, or the run directory cannot be written to.
    """
    os.environ.update(TUNE_ENV)
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are told by our observers, once
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    planned = planned_trials(spec)
    record = RunRecord(run.trials)
    try:
        study = create_study(spec, run.path)
        past = reconcile(spec, run, study, record)
        if past.rows:
            say(f"{past.ended} of {planned} trials have ended, {len(past.rows) - past.ended} go on")
            if (shorter := shorter_trials(spec, past.rows)) is not None:
                say(shorter)
            for observer in observers:
                observer.past(past.rows)
        told = [record, *observers, _Attend(hosts, run.provenance)]  # which of them may find the run taken over
        interrupted = past.ended < planned and _tune(spec, run, hosts, told, study, past)
        rows = run_rows(run)
        ended = ended_count(rows)
        if interrupted or ended < planned:
            for trial, step, path in hosts.save_all(run.folder):
                record.trial_saved(trial, step, path)
            raise Interrupted(
                f"interrupted after {ended} of {planned} trials; what they came to is in {run.place}, and "
                "the same command with --resume goes on"
            )
        return rows
    finally:
        record.close()


def _tune(
    spec: SweepSpec,
    run: RunDirectory,
    hosts: Hosts,
    told: Sequence[Observer],
    study: optuna.Study,
    past: Past,
) -> bool:
    """Have Ray Tune run the trials that are left; whether a signal came meanwhile."""
    searcher = StudySearcher(spec, study, lambda: hosts.capacity, hosts.excuses)
    cause: BaseException | None = None
    try:
        with (
            signals_end_tune() as came,
            seated(hosts, spec=spec, run=run.folder, hosts=hosts.prefix),
        ):
            # tune.run, not Tuner: that one pickles every callback and searcher into the run directory.
            tune.run(
                tune.with_resources(tune.Trainable, {"memory": SEAT_BYTES}),
                search_alg=searcher,
                scheduler=_scheduler(spec, past),
                num_samples=-1,  # the searcher says when all have ended, those that are tried again among them
                reuse_actors=True,
                name=run.tune.name,
                storage_path=str(run.path.resolve()),
                callbacks=[Relay(spec, told, past.rows, searcher.retries, hosts.unsaved)],
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
                raise_on_failed_trial=False,
                verbose=0,
            )
    except tune.TuneError as error:  # made of the traceback's text
        cause = error
        while isinstance(cause, tune.TuneError) and cause.__context__ is not None:
            cause = cause.__context__
    if cause is not None:
        raise cause  # here, where Python does not make Tune's error its context, in place of what it has for one
    return came.is_set()


def _scheduler(spec: SweepSpec, past: Past) -> TrialScheduler:
    if spec.search.scheduler.name == "none":
        return InOrder()
    scheduler = StepAsha(spec)
    scheduler.replay(past.events)
    return scheduler


def _trial_name(trial: Trial) -> str:
    return trial_folder(trial.config["trial"])


class _Attend(Observer):
    """Frees a trial's memory on its host as soon as the trial is over, and looks after the hosts and their record."""

    essential = True

    def __init__(self, hosts: Hosts, record: Path) -> None:
        self._hosts, self._record = hosts, record
        self._known, self._compared = hosts.facts, time.monotonic()
        self._resident: dict[int, str | None] = {}
        """By trial, the host that reported it; None where others may have it as well."""

    def trial_resumed(self, trial: int, parameters: Mapping[str, Any], step: int, damaged: Sequence[str]) -> None:
        self._resident[trial] = None

    def trial_reported(self, trial: int, report: Mapping[str, Any]) -> None:
        self._resident.setdefault(trial, report["host"])
        self._hosts.reported(trial, report["host"])

    def trial_ended(self, trial: int, state: str, reason: str | None) -> None:
        host = self._resident.pop(trial, None)
        self._hosts.release(trial, None if state == "failed" else host)

    def tick(self) -> None:
        self._hosts.look()
        if time.monotonic() - self._compared < LOOK_EVERY_S:
            return
        self._compared = time.monotonic()
        facts, before = self._hosts.facts, self._known
        if facts != before and (known := read_provenance(self._record)):  # nothing, where it cannot be read now
            write_provenance(self._record, known | {"hosts": facts})
            self._known = facts
