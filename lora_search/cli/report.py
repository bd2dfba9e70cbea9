"""`lora-search report`."""

from __future__ import annotations

from pathlib import Path

from lora_search.results import open_run


def report(run: str, out: str | None) -> None:
    """Write a run's page, and say where it lies."""
    opened = open_run(run)
    from lora_search.report import write_report

    print(write_report(opened, Path(out) if out is not None else None))
