"""`write_report`: a run as one page that opens from disk. Never imports Ray, nor torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_search.errors import InputError
from lora_search.report.document import document
from lora_search.report.page import page
from lora_search.rundir import REPORT
from lora_search.storage import StoreError

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
    file = out or run.directory.report
    try:
        if out is None and run.directory.uri is not None:
            run.directory.folder.write(REPORT, html.encode())
            return run.directory.folder.below(REPORT).place
        file.write_text(html, encoding="utf-8")
    except (OSError, StoreError) as error:
        raise InputError(f"--out: {file} cannot be written: {error}; name another file") from None
    return str(file)
