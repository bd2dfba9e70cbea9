"""`lora-search report`."""

from __future__ import annotations

from lora_search.cli.out import local_path
from lora_search.results import open_run


def report(run: str, out: str | None) -> None:
    """Write a run's page, and say where it lies."""
    file = None if out is None else local_path(out)
    opened = open_run(run)
    from lora_search.report import write_report

    print(write_report(opened, file))
