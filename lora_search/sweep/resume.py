"""What an earlier process left of a sweep, made whole, so that a new one can go on with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lora_search.checkpoint import Shelf
from lora_search.errors import InputError
from lora_search.job import lasting
from lora_search.journal import JOURNAL
from lora_search.results import Row, ended_count, read_events, run_rows, trial_rows
from lora_search.rundir import RunDirectory, write_whole
from lora_search.search.searcher import MEMORY
from lora_search.search.study import begun_trials, decode
from lora_search.space import planned_trials, trial_config
from lora_search.spec import SweepSpec, recorded_spec
from lora_search.tracking import RunRecord
from lora_search.tracking.relay import REPORT_KEYS

MAY_CHANGE = ("name", "output", "hosts", "tracking", "search.trials", "training.steps")
"""Keys of the sweep file that may differ when a sweep is resumed; steps may only grow: trials may have done them."""

UNKNOWN_REASON = "not recorded: the sweep was interrupted when the trial had just failed"


@dataclass(frozen=True)
class Past:
    """The trials that earlier processes have run."""

    events: tuple[Row, ...] = ()
    rows: tuple[Row, ...] = ()

    @property
    def ended(self) -> int:
        return ended_count(self.rows)


def refuse_other_sweep(spec: SweepSpec, run: RunDirectory) -> None:
    """
    Raises:
        InputError: the run directory is of another search space, other data or another base; it says what changed.
    """
    before = dict(_flat(recorded_spec(run.spec).model_dump(mode="json")))
    now = dict(_flat(spec.model_dump(mode="json")))
    changed = [
        f"{key}: found {_shown(now.get(key))}, was {_shown(before.get(key))}"
        for key in sorted({*before, *now})
        if lasting(before.get(key)) != lasting(now.get(key)) and not key.startswith(MAY_CHANGE)
    ]
    if not changed and now["training.steps"] < before["training.steps"]:
        raise InputError(
            f"--resume: {run.place} has trials of {before['training.steps']} steps; found training.steps: "
            f"{now['training.steps']}; allowed: {before['training.steps']} and more"
        )
    if changed:
        raise InputError(
            f"--resume: {run.place} is of another sweep: {'; '.join(changed)}; "
            f"allowed to change: {', '.join(MAY_CHANGE)}"
        )


def refuse_fewer_trials(spec: SweepSpec, run: RunDirectory) -> None:
    """
    Raises:
        InputError: some trials that have begun, and not ended, would never be gone on with.
    """
    ended = begun_trials(run.path)
    for row in run_rows(run):
        ended[row["trial"]] = ended.get(row["trial"], False) or row["state"] != "running"
    if not all(ended.values()) and planned_trials(spec) < len(ended):
        raise InputError(
            f"--resume: {run.place} has begun {len(ended)} trials; found search.trials: {planned_trials(spec)}; "
            f"allowed: {len(ended)} and more"
        )


def refuse_links(run: RunDirectory) -> None:
    """
    Raises:
        InputError: a file that lines are put to is a link, and they would go to wherever it leads.
    """
    for file in (run.trials, run.path / JOURNAL):
        if file.is_symlink():
            raise InputError(f"--resume: {file} is a link to {file.readlink()}; allowed: the file itself")


def shorter_trials(spec: SweepSpec, rows: Sequence[Row]) -> str | None:
    """What there is to say of trials that were completed when `training.steps` was less: they have ended."""
    ends = {row["steps"] for row in rows if row["state"] == "completed" and row["steps"] < spec.training.steps}
    if "steps" in spec.search.space or not ends:
        return None
    return (
        f"WARNING: trials that were completed at {max(ends)} steps stay as they are: training.steps: "
        f"{spec.training.steps} is for those that had not ended, and for new ones (search.trials)"
    )


def mend_last_line(file: Path) -> str | None:
    """Cut off a last line that was not written to its end; what there is to say of it."""
    if not file.exists():
        return None
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    last = whole[whole[:-1].rfind(b"\n") + 1 :]
    try:
        json.loads(last or b"{}")
    except ValueError:
        whole = whole[: -len(last)]
    if whole == content:
        return None
    write_whole(file, whole)
    return f"{file}: the last line was damaged, and is left out ({len(content) - len(whole)} bytes)"


def reconcile(spec: SweepSpec, run: RunDirectory, study: optuna.Study, record: RunRecord) -> Past:
    """Tell the study or the record what only the other has heard of; the trials as they stand then.

    Of a trial that has ended by the study alone, the record is told the reports that its checkpoints keep.
    """
    events = tuple(read_events(run.trials))
    known = {row["trial"]: row for row in trial_rows(events)}
    _tell_values(study, events, spec.search.metric)
    for trial in study.get_trials(deepcopy=False):
        row = known.get(trial.number)
        if trial.state.is_finished() and (row is None or row["state"] == "running"):
            _tell_reports(spec, run, record, trial, row)
            state = _state(trial)
            record.trial_ended(trial.number, state, UNKNOWN_REASON if state == "failed" else None)
        elif row is not None and trial.state == TrialState.RUNNING and row["state"] != "running":
            _tell(study, trial, row, spec.search.metric)
    events = tuple(read_events(run.trials))
    return Past(events, tuple(trial_rows(events)))


def _tell_values(study: optuna.Study, events: Sequence[Row], metric: str) -> None:
    """Report to the study what only the record has of trials that run there."""
    running = {trial.number: trial for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING])}
    for event in events:
        trial = running.get(event["trial"])
        if trial is None or event["event"] != "report" or event["step"] in trial.intermediate_values:
            continue
        if event.get(metric) is not None:
            optuna.Trial(study, trial._trial_id).report(event[metric], event["step"])


def _tell_reports(
    spec: SweepSpec, run: RunDirectory, record: RunRecord, trial: FrozenTrial, row: Mapping[str, Any] | None
) -> None:
    parameters = decode(spec.search.space, trial.params)
    if row is None:
        record.trial_started(trial.number, trial_config(spec, parameters).parameters() | parameters)
    saved = Shelf(run.folder, trial.number).newest()
    if saved is not None and saved.parameters == parameters:
        for report in saved.reports:
            if report["step"] > (row["steps"] if row else 0):
                record.trial_reported(trial.number, {key: report[key] for key in REPORT_KEYS if key in report})


def _state(trial: FrozenTrial) -> Any:
    if trial.state == TrialState.COMPLETE:
        return "completed"
    infeasible = trial.constraints.get(MEMORY, 0) > 0
    return "stopped" if trial.state == TrialState.PRUNED and not infeasible else "failed"


def _tell(study: optuna.Study, trial: FrozenTrial, row: Mapping[str, Any], metric: str) -> None:
    match row["state"]:
        case "completed":
            study.tell(trial.number, row[metric])  # the study may have lost its last lines, and know less
        case "stopped":
            study.tell(trial.number, state=TrialState.PRUNED)
        case _:
            study.tell(trial.number, state=TrialState.FAIL)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)
