"""`lora-search merge`."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_search.errors import InputError
from lora_search.results import best_row, run_rows
from lora_search.rundir import find_run
from lora_search.spec import load_spec


def merge(run: str, trial: str, out: str, *, trusts_code: bool = False) -> None:
    """Merge a trial's adapter and say what it came to.

    Args:
        trusts_code: let the base run code of its own, if the run directory, which may be somebody else's, says so.
    """
    directory = find_run(run)
    spec = load_spec(directory.spec)
    if spec.base.trust_remote_code and not trusts_code:
        raise InputError(
            f"{directory.spec}: base.trust_remote_code: found true: {spec.base.model} would run code of its own; "
            "--trust-remote-code allows it"
        )
    folder = Path(out)
    if folder.exists():
        raise InputError(f"--out {out}: exists already; name a folder that does not")
    rows = run_rows(directory)
    if trial == "best":
        best = best_row(rows, spec.search.metric, spec.search.mode)
        if best is None:
            raise InputError(f"--trial best: no trial of {directory.place} has come to a result")
        number = int(best["trial"])
    elif trial.isdigit():
        number = int(trial)
    else:
        raise InputError(f"--trial {trial}: must be best or a trial's number")
    from lora_search.best import merge_trial, require_trial, signed

    require_trial(rows, number)
    print(f"lora-search: merging trial {number} of {directory.place}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    merged = merge_trial(spec, directory, number, folder)
    ways = ", ".join(f"{way} {loss:.4f}" for way, loss in merged.losses.items())
    print(
        f"{folder}: trial {number} merged onto the {merged.onto} weights; validation loss {merged.loss:.4f}, "
        f"{signed(merged.drift)} from the adapter's {merged.adapter_loss:.4f} (measured: {ways})"
    )
    if not merged.within_tolerance:
        print("lora-search: WARNING: the merged model differs from the adapter by more than 1 %", file=sys.stderr)
