"""Run a sweep from its checked sweep file to its concluded run directory."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import optuna
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from lora_search.best import (
    Conclusion,
    export_adapter,
    merge_best,
    test_adapter,
    write_card,
    write_config,
)
from lora_search.errors import Interrupted, SweepError
from lora_search.results import Row, best_row, run_rows
from lora_search.rundir import RunDirectory
from lora_search.search import StudySearcher, create_study
from lora_search.search.study import planned_trials
from lora_search.seat import Seat
from lora_search.space import first_rung, trial_config
from lora_search.spec import SweepSpec, dump_spec
from lora_search.sweep.cluster import Hosts, build_engine, cluster, import_engine, seat_resources, start_hosts
from lora_search.sweep.prepare import DataSummary, prepare
from lora_search.sweep.provenance import provenance, write_provenance
from lora_search.tracking import Observer, RunRecord
from lora_search.tracking.relay import Relay

KEPT_CHECKPOINTS = 2
"""Of each trial: the newest, and the one before should the newest be damaged."""

TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials.jsonl is the record
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

Say = Callable[[str], None]


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
    say: Say = lambda line: None,
) -> Outcome:
    """Search, then test, export and merge the best.

    Args:
        run: a run directory that is empty yet.
        observers: told of every trial, besides the run directory's own record.
        address: of a Ray cluster; None starts one on this machine.
        say: prints one line to the user.

    Raises:
        InputError: the base, the data, a target set or the hosts cannot be used.
        Interrupted: by a signal; what was recorded stays.
        SweepError: no trial came to a result, or a host was lost.
    """
    try:
        return _run(spec, run, observers, address, say)
    finally:
        for observer in observers:
            observer.close()


def _run(spec: SweepSpec, run: RunDirectory, observers: Sequence[Observer], address: str | None, say: Say) -> Outcome:
    run.spec.write_text(dump_spec(spec), encoding="utf-8")
    facts = provenance(spec)
    write_provenance(run.provenance, facts)
    with cluster(address):
        say("preparing the data and the hosts")
        hosts = start_hosts(spec, build_engine)
        try:
            summary, data = hosts.prepare(partial(prepare, spec, hosts.places[0]), import_engine)
            say(_data_line(summary))
            ready = hosts.load(data)
            write_provenance(run.provenance, facts | {"data": asdict(summary), "hosts": ready})
            search(spec, run, hosts, observers)
            rows = run_rows(run)
            best = best_row(rows, spec.search.metric, spec.search.mode)
            if best is None:
                raise SweepError(_why_nothing(rows))
            say(f"trial {best['trial']} is best; testing and merging its adapter")
            found = conclude(spec, run, best, hosts, data)
        finally:
            hosts.end()
    write_card(spec, run, rows, best, found)
    for observer in observers:
        observer.concluded(rows, best, run.best / "adapter")
    return Outcome(run, rows, best, found)


def search(spec: SweepSpec, run: RunDirectory, hosts: Hosts, observers: Sequence[Observer] = ()) -> None:
    """Run all trials of a sweep on its hosts.

    Raises:
        Interrupted: by a signal.
    """
    os.environ.update(TUNE_ENV)
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are told by our observers, once
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    planned = planned_trials(spec)
    record = RunRecord(run.trials)
    searcher = StudySearcher(spec, create_study(spec, run.path))
    told = [record, _Release(hosts), _Explain(searcher), *observers]
    try:
        with _sigterm_as_sigusr1():
            # tune.run, not Tuner: that one pickles every callback and searcher into the run directory.
            tune.run(
                tune.with_resources(
                    tune.with_parameters(Seat, spec=spec, hosts=hosts.actors), seat_resources(hosts.capacity)
                ),
                search_alg=searcher,
                scheduler=_scheduler(spec),
                num_samples=planned,
                max_concurrent_trials=hosts.capacity,
                reuse_actors=True,
                name=run.tune.name,
                storage_path=str(run.path.resolve()),
                callbacks=[Relay(spec, run.path, told)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1, num_to_keep=KEPT_CHECKPOINTS),
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
                raise_on_failed_trial=False,
                verbose=0,
            )
    finally:
        searcher.close()
        record.close()
    ended = sum(row["state"] != "running" for row in run_rows(run))
    if ended < planned:
        raise Interrupted(f"interrupted after {ended} of {planned} trials; what they came to is in {run.path}")


def conclude(spec: SweepSpec, run: RunDirectory, best: Row, hosts: Hosts, data: Any) -> Conclusion:
    """Export, test and merge the best trial's adapter, on hosts: their processes have all they need."""
    run.best.mkdir(exist_ok=True)
    write_config(spec, best, run.best / "config.yaml")
    checkpoint = export_adapter(run, best["trial"], run.best / "adapter")
    config = trial_config(spec, {name: best[name] for name in spec.search.space})
    tested, merged = hosts.finish(
        partial(test_adapter, config, checkpoint),
        partial(merge_best, spec, run, best["eval_loss"], hosts.places[-1].gpus > 0),
        data,
    )
    return Conclusion(trial=best["trial"], **tested, **merged)


def _scheduler(spec: SweepSpec) -> TrialScheduler:
    if spec.search.scheduler.name == "none":
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="step",
        metric=spec.search.metric,
        mode=spec.search.mode,
        max_t=spec.max_steps,
        grace_period=first_rung(spec),
        reduction_factor=spec.search.scheduler.reduction_factor,
    )


def _trial_name(trial: Trial) -> str:
    return f"trial-{trial.config['trial']:04d}"


class _Release(Observer):
    """Frees a trial's memory on its host as soon as the trial is over."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts

    def trial_ended(self, trial: int, state: str, reason: str | None) -> None:
        self._hosts.release(trial)


class _Explain(Observer):
    """Tells the searcher why a trial failed."""

    def __init__(self, searcher: StudySearcher) -> None:
        self._searcher = searcher

    def trial_ended(self, trial: int, state: str, reason: str | None) -> None:
        if state == "failed":
            self._searcher.explain_failure(trial, reason)


@contextmanager
def _sigterm_as_sigusr1() -> Iterator[None]:
    """Let SIGTERM, a spot machine's warning, end Tune's loop as cleanly as SIGINT does.

    Tune catches SIGINT and SIGUSR1 alone; each ends its loop after the current event.
    """

    def forward(number: int, frame: object) -> None:
        signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _data_line(summary: DataSummary) -> str:
    line = (
        f"data: {summary.train_rows:,} rows ({summary.train_tokens:,} tokens) to train on, "
        f"{summary.validation_rows:,} to validate, {summary.test_rows:,} to test"
    )
    if summary.truncated:
        line += f"; {summary.truncated:,} cut at max_length"
    if summary.dropped:
        line += f"; {summary.dropped:,} dropped, max_length leaves them nothing to train on"
    return line


def _why_nothing(rows: Sequence[Row]) -> str:
    reasons = {row["reason"] for row in rows if row.get("reason")}
    return f"no trial of {len(rows)} came to a result: {'; '.join(sorted(reasons)) or 'none reported anything'}"
