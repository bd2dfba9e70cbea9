"""Which trials of a run a command is about."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_search.errors import InputError
from lora_search.results import Row, ranked_rows
from lora_search.rundir import RunDirectory
from lora_search.spec import SweepSpec


def chosen_trial(run: RunDirectory, spec: SweepSpec, rows: Sequence[Row], trial: str) -> Row:
    """The row of the trial that `--trial` names: `best`, or a number.

    Raises:
        InputError: it names none.
    """
    if trial != "best" and not _is_number(trial):
        raise InputError(f"--trial {trial}: must be best or a trial's number")
    return _row(run, spec, rows, trial, f"--trial {trial}")


def chosen_trials(run: RunDirectory, spec: SweepSpec, rows: Sequence[Row], trials: str) -> list[Row]:
    """The rows of the trials that `--trials` names: numbers or `best` with commas between them, or `topK`.

    Returns:
        Each once, in the order in which they are named; of `topK`, the best first.

    Raises:
        InputError: there is no such trial, or fewer than K have come to a result.
    """
    option = f"--trials {trials}"
    if match := re.fullmatch(r"top(\d{1,6})", trials):
        ranked = ranked_rows(rows, spec.search.metric, spec.search.mode)[: int(match[1])]
        if len(ranked) < max(1, int(match[1])):
            some = f"only {len(ranked)} trials" if ranked else "no trial"
            raise InputError(f"{option}: {some} of {run.place} has come to a result")
        return ranked
    names = [name.strip() for name in trials.split(",")]
    if not all(name == "best" or _is_number(name) for name in names):
        raise InputError(f"{option}: must be trials' numbers with commas between them, or topK such as top3")
    found = [_row(run, spec, rows, name, option) for name in names]
    return list({row["trial"]: row for row in found}.values())


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


def _row(run: RunDirectory, spec: SweepSpec, rows: Sequence[Row], name: str, option: str) -> Row:
    if name == "best":
        ranked = ranked_rows(rows, spec.search.metric, spec.search.mode)
        if not ranked:
            raise InputError(f"{option}: no trial of {run.place} has come to a result")
        return ranked[0]
    for row in rows:
        if row["trial"] == int(name):
            return row
    raise InputError(f"{option}: no such trial; the run has {len(rows)}, numbered from 0")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
