"""`write_report`: a run as one page that opens from disk. Never imports Ray, nor torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_search.errors import InputError
from lora_search.report.document import document
from lora_search.report.page import page
from lora_search.rundir import REPORT

if TYPE_CHECKING:
    from lora_search.results import Run

__all__ = ["document", "page", "write_report"]


def write_report(run: Run, out: Path | None = None, *, finished: bool | None = None) -> str:
    """Write a run's page; where it lies.

    Args:
        out: a file; None is `report.html` in the run directory, in its object store too.
        finished: whether the sweep has come to its end; None looks.

    Raises:
        InputError: the file cannot be written.
        SweepError: a file of the run directory is not what it should be.
    """
    html = page(document(run, finished=finished))
    directory = run.directory
    place = str(out or (directory.folder.below(REPORT).place if directory.uri is not None else directory.report))
    try:
        if out is None:
            directory.folder.write(REPORT, html.encode())
        else:
            out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out: {place} cannot be written: {error}; name another file") from None
    return place
