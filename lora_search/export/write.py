"""Write an export: complete, or not there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_search.errors import InputError, SweepError
from lora_search.export.formats import FORMATS
from lora_search.export.page import Page, render
from lora_search.export.trained import Trained

PAGE = "README.md"


def export_trial(trained: Trained, form: str, out: Path) -> None:
    """Write a trial at `out`, which must not be there or be an empty folder; it appears when it is complete.

    Args:
        form: one of FORMATS.

    Raises:
        InputError: `out` is taken, the format is unknown, or the target cannot express the trial at all.
        SweepError: the run directory is damaged, or `out` cannot be written.
    """
    if form not in FORMATS:
        raise InputError(f"--to {form}: unknown format; allowed: {', '.join(FORMATS)}")
    with complete_or_absent(out) as part:
        page = _writer(form)(trained, part)
        (part / PAGE).write_text(render(page, trained), encoding="utf-8")


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `out` when all has gone well.

    An empty `out` stays the folder that it is, for it may be somebody's working directory: it is given the files, the
    page that tells of them last.

    Raises:
        InputError: `out` is taken.
        SweepError: it cannot be written.
    """
    try:
        is_taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be read: {error.strerror or error}") from None
    if is_taken:
        raise InputError(f"--out {out}: exists already; name a folder that does not, or an empty one")
    is_there = out.is_dir()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}.", dir=out if is_there else out.parent))
        try:
            yield part
            if is_there:
                for file in sorted(part.iterdir(), key=lambda file: file.name == PAGE):
                    file.rename(out / file.name)
            else:
                part.chmod(0o755)  # mkdtemp keeps others out
                part.replace(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise SweepError(f"--out {out}: cannot be written: {error}") from error


def _writer(form: str) -> Callable[[Trained, Path], Page]:
    """Imported when asked for: optuna, transformers and torch are slow to import."""
    match form:
        case "yaml":
            from lora_search.export.yaml import write
        case "peft":
            from lora_search.export.peft import write
        case "trl":
            from lora_search.export.trl import write
        case "transformers":
            from lora_search.export.transformers import write
        case "axolotl":
            from lora_search.export.axolotl import write
        case "llamafactory":
            from lora_search.export.llamafactory import write
        case "torchtune":
            from lora_search.export.torchtune import write
        case "unsloth":
            from lora_search.export.unsloth import write
        case "optuna":
            from lora_search.export.optuna import write
        case _:
            from lora_search.export.wandb import write
    return write
