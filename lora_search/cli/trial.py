"""Which trial of a run a command is about."""

from __future__ import annotations

from collections.abc import Sequence

from lora_search.errors import InputError
from lora_search.results import Row, best_row
from lora_search.rundir import RunDirectory
from lora_search.spec import SweepSpec


def chosen_trial(run: RunDirectory, spec: SweepSpec, rows: Sequence[Row], trial: str) -> Row:
    """The row of the trial that `--trial` names: `best`, or a number.

    Raises:
        InputError: it names none.
    """
    if trial == "best":
        best = best_row(rows, spec.search.metric, spec.search.mode)
        if best is None:
            raise InputError(f"--trial best: no trial of {run.place} has come to a result")
        return best
    if not (trial.isascii() and trial.isdigit()):
        raise InputError(f"--trial {trial}: must be best or a trial's number")
    for row in rows:
        if row["trial"] == int(trial):
            return row
    raise InputError(f"--trial {trial}: no such trial; the run has {len(rows)}, numbered from 0")


def require_trust(run: RunDirectory, spec: SweepSpec, *, trusts_code: bool) -> None:
    """Let a base run code of its own only if the user says so here: the run directory may be somebody else's.

    Raises:
        InputError: it would, and the user does not.
    """
    if spec.base.trust_remote_code and not trusts_code:
        raise InputError(
            f"{run.spec}: base.trust_remote_code: found true: {spec.base.model} would run code of its own; "
            "--trust-remote-code allows it"
        )
