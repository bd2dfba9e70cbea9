"""`lora-search doctor`."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict

from lora_search.errors import SweepError
from lora_search.job import cluster_address
from lora_search.spec.secret import refuse_secret

STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


def doctor(address: str | None, output: str, *, as_json: bool) -> None:
    """Print what was looked at, as it is found.

    Raises:
        InputError: the output looks like a secret.
        SweepError: something is wrong.
    """
    from rich.console import Console
    from rich.markup import escape

    from lora_search.doctor import examine

    refuse_secret("--output", output)
    cluster, _ = cluster_address(address)
    console = Console(file=sys.stdout)
    checks = []
    with redirect_stdout(sys.stderr):  # standard output is ours; libraries may print
        for check in examine(cluster, output):
            checks.append(check)
            if not as_json:
                style = STYLES[check.state]
                console.print(
                    f"[{style}]{check.state:>5}[/]  {escape(check.what)}: {escape(check.found)}", highlight=False
                )
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    wrong = sum(check.state == "wrong" for check in checks)
    if wrong:
        raise SweepError(f"{wrong} of {len(checks)} things are wrong")
