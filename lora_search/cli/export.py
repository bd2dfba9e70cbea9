"""`lora-search export`."""

from __future__ import annotations

from pathlib import Path

from lora_search.cli.trial import chosen_trial, require_trust
from lora_search.errors import harmless
from lora_search.export import describe, export_trial, shown_size
from lora_search.results import run_rows
from lora_search.rundir import find_run
from lora_search.spec import load_spec


def export(run: str, trial: str, form: str, out: str, *, trusts_code: bool = False) -> None:
    """Write a trial in the form of another tool, and say where.

    Args:
        trusts_code: let the base run code of its own, here and in what is written, if the run directory says so.
    """
    directory = find_run(run)
    spec = load_spec(directory.spec)
    require_trust(directory, spec, trusts_code=trusts_code)
    rows = run_rows(directory)
    trained = describe(directory, spec, rows, chosen_trial(directory, spec, rows, trial))
    folder = Path(out)
    export_trial(trained, form, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    steps = f"{trained.steps} of {trained.planned_steps} steps"
    print(
        f"{harmless(str(folder))}: trial {trained.trial} ({steps}) for {form}, "
        f"{shown_size(size)}; its README.md says how it runs and what it cannot express"
    )
