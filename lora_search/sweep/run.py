"""Run a sweep from its checked sweep file to its concluded run directory."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from operator import methodcaller
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lora_search.best import Conclusion, write_card
from lora_search.errors import InputError, SweepError
from lora_search.imports import import_libraries
from lora_search.journal import JOURNAL, JOURNAL_LOCK
from lora_search.report import document, page
from lora_search.results import Row, Run, best_row, ended_count, read_events, run_rows, trial_rows
from lora_search.rundir import RunDirectory, discard, locked, refuse_begun, write_whole
from lora_search.space import planned_trials
from lora_search.spec import SweepSpec, dump_spec, recorded_spec
from lora_search.storage import StoreError
from lora_search.sweep.ahead import MergeAhead
from lora_search.sweep.answers import HostLost
from lora_search.sweep.build import build_engine
from lora_search.sweep.cluster import Say, asked_of_autoscaler, cluster
from lora_search.sweep.conclude import conclude
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
    mend_last_line,
    refuse_fewer_trials,
    refuse_links,
    refuse_other_sweep,
    shorter_trials,
)
from lora_search.sweep.signals import sigterm_interrupts
from lora_search.sweep.trials import search
from lora_search.sweep.upload import Held, kept_uploaded, require_held
from lora_search.tracking import Observer

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
        unused = nullcontext() if resume else _begun_here(run)
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
def _begun_here(run: RunDirectory) -> Iterator[None]:
    """Where the input is found wrong before any trial, the run directory is removed: mended, it begins by that name."""
    refuse_begun(run)
    try:
        yield
    except InputError:
        if not run.trials.exists():
            discard(run)
        raise


@contextmanager
def _taken_up(run: RunDirectory, before: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[None]:
    """Have in a run's provenance at once that it is resumed, so that nobody takes the hosts of before for those of now.

    And by which scheduler's job: preempted, that goes on with this run. Where it may not be resumed, its provenance is
    as it was.
    """
    if not before:
        yield
        return
    was = run.provenance.read_bytes()
    write_provenance(run.provenance, {**before, "job": facts["job"], "resumed": facts["resumed"], "hosts": []})
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
        refuse_fewer_trials(spec, run)
    ended, recorded = _so_far(run)
    facts = provenance(spec, before, recorded)
    if not run.spec.exists():
        write_whole(run.spec, dump_spec(spec))
        write_provenance(run.provenance, facts)
    grown = asked_of_autoscaler(spec.hosts, max(1, planned_trials(spec) - ended)) if address else nullcontext(None)
    with _taken_up(run, before, facts), cluster(address, say), ended_without_head(run.place), grown as ask_again:
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
            named = spec.model_copy(update={"name": recorded_spec(run.spec).name})  # not what --name found it by
            write_whole(run.spec, dump_spec(named))  # only now: what is resumed stays as it was until this one can be
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


def _so_far(run: RunDirectory) -> tuple[int, float]:
    """Trials that have ended, and the last time in the record, in seconds since 1970; its lines are not kept."""
    events = list(read_events(run.trials))
    return ended_count(trial_rows(events)), max((event["time"] for event in events), default=0.0)


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
