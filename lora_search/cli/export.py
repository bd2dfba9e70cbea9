"""`lora-search export`."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_search.cli.out import local_path
from lora_search.cli.trials import chosen_trial, chosen_trials, require_trust
from lora_search.errors import InputError, harmless
from lora_search.export import LAYOUTS, SHOWN_TRIALS, describe, export_trial, shown_size
from lora_search.results import Row, ranked_rows, run_rows
from lora_search.rundir import RunDirectory, find_run
from lora_search.spec import SweepSpec, recorded_spec


def export(run: str, trial: str | None, trials: str | None, form: str, out: str, *, trusts_code: bool = False) -> None:
    """Write a trial in the form of another tool, or several as a layout, and say where.

    Args:
        trial: `best` or a number. None: the best, or, for one of LAYOUTS, what `trials` says.
        trials: as `chosen_trials` reads them; for one of LAYOUTS. None: the best few.
        trusts_code: let the base run code of its own, here and in what is written, if the run directory says so.
    """
    folder = local_path(out)
    directory = find_run(run)
    spec = recorded_spec(directory.spec)
    require_trust(directory, spec, trusts_code=trusts_code)
    rows = run_rows(directory)
    if form in LAYOUTS:
        if trial is not None and trials is not None:
            raise InputError(f"--trial {trial} --trials {trials}: say one of them")
        chosen = None if trial is None else [chosen_trial(directory, spec, rows, trial)]
        _layout(directory, spec, rows, chosen, trials, form, folder)
        return
    if trials is not None:
        raise InputError(f"--trials {trials}: --to {form} takes one trial; say --trial")
    trained = describe(directory, spec, rows, chosen_trial(directory, spec, rows, trial or "best"))
    export_trial(trained, form, folder)
    steps = f"{trained.steps} of {trained.planned_steps} steps"
    _told(folder, f"trial {trained.trial} ({steps}) for {form}", "how it runs and what it cannot express")


def _layout(
    directory: RunDirectory,
    spec: SweepSpec,
    rows: list[Row],
    chosen: list[Row] | None,
    trials: str | None,
    form: str,
    folder: Path,
) -> None:
    from lora_search.export.layout import write_layout

    if chosen is None and trials is not None:
        chosen = chosen_trials(directory, spec, rows, trials)
    elif chosen is None:
        chosen = ranked_rows(rows, spec.search.metric, spec.search.mode)[:SHOWN_TRIALS]
    if not chosen:
        raise InputError(f"RUN: no trial of {directory.place} has come to a result")
    for reason in write_layout(directory, spec, chosen, form, folder):
        print(f"lora-search: left out: {harmless(reason)}", file=sys.stderr)
    numbers = ", ".join(str(row["trial"]) for row in chosen)
    _told(folder, f"trials {numbers} for {form}", "how they are served")


def _told(folder: Path, what: str, page: str) -> None:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{harmless(str(folder))}: {what}, {shown_size(size)}; its README.md says {page}")
