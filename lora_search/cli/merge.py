"""`lora-search merge`."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_search.cli.trial import chosen_trial, require_trust
from lora_search.errors import InputError
from lora_search.results import run_rows
from lora_search.rundir import find_run
from lora_search.spec import load_spec


def merge(run: str, trial: str, out: str, *, trusts_code: bool = False) -> None:
    """Merge a trial's adapter and say what it came to.

    Args:
        trusts_code: let the base run code of its own, if the run directory, which may be somebody else's, says so.
    """
    directory = find_run(run)
    spec = load_spec(directory.spec)
    require_trust(directory, spec, trusts_code=trusts_code)
    folder = Path(out)
    if folder.exists():
        raise InputError(f"--out {out}: exists already; name a folder that does not")
    number = int(chosen_trial(directory, spec, run_rows(directory), trial)["trial"])
    from lora_search.best import merge_trial, signed

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
