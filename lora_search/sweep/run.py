"""Run a sweep from its checked sweep file to its concluded run directory."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import optuna
from pydantic import TypeAdapter, ValidationError
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from lora_search.best import Conclusion, write_card
from lora_search.checkpoint import trial_folder
from lora_search.errors import InputError, Interrupted, SweepError
from lora_search.imports import import_libraries
from lora_search.job import scheduled_job
from lora_search.journal import JOURNAL, JOURNAL_LOCK
from lora_search.report import document, page
from lora_search.results import Row, Run, best_row, ended_count, run_rows
from lora_search.rundir import RunDirectory, discard, locked, write_whole
from lora_search.search import StudySearcher, create_study
from lora_search.search.asha import InOrder, StepAsha
from lora_search.seat import SEAT_BYTES
from lora_search.space import planned_trials
from lora_search.spec import SweepSpec, dump_spec
from lora_search.storage import StoreError
from lora_search.sweep.ahead import MergeAhead
from lora_search.sweep.answers import HostLost
from lora_search.sweep.build import build_engine
from lora_search.sweep.cluster import Say, asked_of_autoscaler, cluster
from lora_search.sweep.conclude import conclude
from lora_search.sweep.controller import seated
from lora_search.sweep.head import ended_without_head
from lora_search.sweep.hosts import Hosts
from lora_search.sweep.prepare import (
    DataSummary,
    fingerprint_of_base,
    one_base,
    prepare,
    refuse_other_material,
    require_base,
)
from lora_search.sweep.provenance import provenance, read_provenance, write_provenance
from lora_search.sweep.resume import (
    Past,
    mend_last_line,
    reconcile,
    refuse_links,
    refuse_other_sweep,
    shorter_trials,
)
from lora_search.sweep.roster import LOOK_EVERY_S
from lora_search.sweep.signals import signals_end_tune, sigterm_interrupts
from lora_search.sweep.upload import Held, kept_uploaded, require_held
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

UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,  # this and the next two: a file server that has gone
    errno.ETIMEDOUT,
    errno.ENOTCONN,
)


@dataclass(frozen=True)
class Outcome:
    """A sweep that has come to its end."""

    run: RunDirectory
    rows: list[Row]
    best: Row
    conclusion: Conclusion


def run_sweep(
    spec: SweepSpec,
    run: RunDirectory,
    observers: Sequence[Observer] = (),
    *,
    address: str | None = None,
    resume: bool = False,
    say: Say = lambda line: None,
) -> Outcome:
    """Search, then test, export and merge the best.

    Args:
        run: a run directory that is empty yet, unless `resume`.
        observers: told of every trial, besides the run directory's own record.
        address: of a Ray cluster; None starts one on this machine.
        resume: go on with what an earlier process has left in the run directory.
        say: prints one line to the user.

    Raises:
        InputError: the base, the data, a target set or the hosts cannot be used, and the new run directory is gone
            again; or what is to be resumed is another sweep, or runs.
        Interrupted: by a signal; the sweep can be resumed.
        SweepError: no trial came to a result, all hosts were lost, or the run directory cannot be written to.
    """
    try:
        unused = nullcontext() if resume else _discarded_unused(run)
        with sigterm_interrupts(run.place), locked(run) as held, unused, kept_uploaded(run, held):
            return _run(spec, run, [*observers, Held(run, held)], held, address, resume, say)
    except OSError as error:
        if error.errno not in UNWRITABLE and not isinstance(error, StoreError):
            raise
        where = run.place if isinstance(error, StoreError) else run.path  # of a stored run, the copy here
        raise SweepError(f"{where} cannot be written to: {error}; mend it, then --resume") from error
    except RuntimeError as error:  # what Optuna makes of a lock file that it cannot write or remove
        cause = error.__context__
        if not isinstance(cause, OSError) or cause.errno not in UNWRITABLE:
            raise
        raise SweepError(f"{run.path} cannot be written to: {cause}; mend it, then --resume") from error
    finally:
        for observer in observers:
            observer.close()


@contextmanager
def _discarded_unused(run: RunDirectory) -> Iterator[None]:
    """Remove a run directory where the input is found wrong before any trial: mended, it begins anew by that name."""
    try:
        yield
    except InputError:
        if not run.trials.exists():
            discard(run)
        raise


@contextmanager
def _taken_up(run: RunDirectory, before: Mapping[str, Any]) -> Iterator[None]:
    """Have the scheduler's job that resumes a run in its provenance at once: preempted, the job goes on with this one.

    Where it may not be resumed, its provenance is as it was.
    """
    job = scheduled_job()
    if not before or before.get("job") == job:
        yield
        return
    was = run.provenance.read_bytes()
    write_provenance(run.provenance, {**before, "job": job})
    taken = run.provenance.read_bytes()
    try:
        yield
    except InputError:
        if run.provenance.read_bytes() == taken:
            write_whole(run.provenance, was)
        raise


def _run(
    spec: SweepSpec,
    run: RunDirectory,
    observers: Sequence[Observer],
    held: Callable[[], bool],
    address: str | None,
    resume: bool,
    say: Say,
) -> Outcome:
    before: dict[str, Any] = {}
    if resume:
        refuse_links(run)
        refuse_other_sweep(spec, run)
        before = read_provenance(run.provenance)
        if (outcome := _concluded(spec, run, before)) is not None:
            if run.report.name not in run.folder.names():  # the process was ended before it was made
                _report(run, say)
            say(shorter_trials(spec, outcome.rows) or "the sweep is finished; nothing is left to do")
            return outcome
        (run.path / JOURNAL_LOCK).unlink(missing_ok=True)  # of a process that was killed; ours is the only one
        for file in (run.trials, run.path / JOURNAL):
            if (mended := mend_last_line(file)) is not None:
                say(mended)
    facts = provenance(spec, before)
    if not run.spec.exists():
        write_whole(run.spec, dump_spec(spec))
        write_provenance(run.provenance, facts)
    left = planned_trials(spec) - ended_count(run_rows(run)) if resume else planned_trials(spec)
    grown = asked_of_autoscaler(spec.hosts, max(1, left)) if address else nullcontext(None)
    with _taken_up(run, before), cluster(address, say), ended_without_head(run.place), grown as ask_again:
        say("preparing the data and the hosts")
        hosts = Hosts(spec, build_engine, say, run.folder)
        try:
            hosts.require_same_nodes()
            summary = hosts.prepare(partial(prepare, spec), import_libraries)
            refuse_other_material(before, "data", summary.fingerprint)
            say(_data_line(summary))
            if (planned := planned_trials(spec)) < spec.search.trials:
                say(
                    f"the space has {planned} configurations, and search.trials is {spec.search.trials}: each runs once"
                )
            if summary.advice is not None:
                say(f"WARNING: {summary.advice}")
            hosts.load()
            if ask_again is not None and spec.hosts.trials_per_host == "auto":
                with suppress(HostLost):  # then it stays as it was
                    ask_again(hosts.ask_one(methodcaller("together")))
            base = one_base(hosts.ask_all(partial(fingerprint_of_base, spec)))
            refuse_other_material(before, "base", base)
            base = base or before.get("base", {}).get("fingerprint")
            hosts.check = partial(require_base, spec, base)
            require_held(run, held)
            write_whole(run.spec, dump_spec(spec))  # only now: what is resumed stays as it was until this one can be
            write_provenance(
                run.provenance, facts | {"data": asdict(summary), "base": {"fingerprint": base}, "hosts": hosts.facts}
            )
            rows = search(spec, run, hosts, [*observers, MergeAhead(spec, hosts)], say)
            best = best_row(rows, spec.search.metric, spec.search.mode)
            if best is None:
                raise SweepError(_why_nothing(rows))
            say(f"trial {best['trial']} is best; testing and merging its adapter")
            require_held(run, held)
            found = conclude(spec, run, best, hosts, say)
        finally:
            hosts.end()
    require_held(run, held)
    write_card(spec, run, rows, best, found)
    if run.uri is not None:  # before anything there says that the sweep has come to its end
        run.folder.below(run.best.name).upload(run.best)
    write_provenance(run.provenance, read_provenance(run.provenance) | {"conclusion": found.to_dict()})
    for observer in observers:
        observer.concluded(rows, best, run.best / "adapter")
    _report(run, say)
    return Outcome(run, rows, best, found)


def _report(run: RunDirectory, say: Say) -> None:
    try:
        html = page(document(Run(run), finished=True))
    except Exception as error:  # whatever it is: the sweep has its result, and `lora-search report` can be asked again
        logging.getLogger(__name__).warning("no report", exc_info=True)
        say(f"no report was written: {type(error).__name__}: {error}")
        return
    write_whole(run.report, html)


def _concluded(spec: SweepSpec, run: RunDirectory, before: Mapping[str, Any]) -> Outcome | None:
    """What a sweep came to, if it has come to its end and no more trials are asked for."""
    if "conclusion" not in before:
        return None
    rows = run_rows(run)
    if ended_count(rows) < planned_trials(spec):
        return None
    try:
        conclusion = TypeAdapter(Conclusion).validate_python(before["conclusion"])
        best = next(row for row in rows if row["trial"] == conclusion.trial)
    except (ValidationError, StopIteration) as error:
        raise SweepError(f"{run.provenance}: conclusion: is not this sweep's: {error}") from None
    return Outcome(run, rows, best, conclusion)


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
        told = [record, _Attend(hosts, run.provenance), *observers]
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
        self._hosts.reported(trial)

    def trial_ended(self, trial: int, state: str, reason: str | None) -> None:
        host = self._resident.pop(trial, None)
        self._hosts.release(trial, None if state == "failed" else host)

    def tick(self) -> None:
        self._hosts.look()
        if time.monotonic() - self._compared < LOOK_EVERY_S:
            return
        self._compared = time.monotonic()
        if (facts := self._hosts.facts) != self._known:
            write_provenance(self._record, read_provenance(self._record) | {"hosts": facts})
            self._known = facts


def _data_line(summary: DataSummary) -> str:
    line = (
        f"data: {summary.train_rows:,} rows ({summary.train_tokens:,} tokens) to train on, "
        f"{summary.validation_rows:,} to validate, {summary.test_rows:,} to test"
    )
    if summary.truncated:
        line += f"; {summary.truncated:,} cut at max_length"
    if summary.dropped:
        line += f"; {summary.dropped:,} dropped, max_length leaves them nothing to train on"
    if summary.overlapping:
        line += f"; {summary.overlapping:,} left out, their text stands in a file to validate or test by"
    return line


def _why_nothing(rows: Sequence[Row]) -> str:
    reasons = {row["reason"] for row in rows if row.get("reason")}
    return f"no trial of {len(rows)} came to a result: {'; '.join(sorted(reasons)) or 'none reported anything'}"
