"""README.md of an export: what it is, how it is run, and what the target cannot express."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lora_search
from lora_search.export.material import RowFile
from lora_search.export.trained import Trained


@dataclass(frozen=True)
class Page:
    """What one target says of its export."""

    title: str
    commands: Sequence[str]
    """To be typed in the export's folder."""
    files: Mapping[str, str]
    """Name and meaning of each."""
    made_for: Mapping[str, str]
    """Versions that the export was checked with, by package."""
    limits: Sequence[str] = ()
    """What the target cannot express, and what was done instead."""
    rows: Sequence[RowFile] = ()
    notes: Sequence[str] = ()
    """Paragraphs on how the export came about."""


def installed(*packages: str) -> dict[str, str]:
    """The versions of packages here."""
    return {name: found for name in packages if (found := _version(name)) is not None}


def render(page: Page, trained: Trained) -> str:
    """The text of README.md."""
    lines = [f"# {page.title}", ""]
    lines += [f"Written by lora-search {lora_search.__version__}.", ""]
    lines += _table(trained)
    lines += ["", "## Run", "", "```sh", *page.commands, "```", ""]
    lines += ["Made for " + ", ".join(f"{name} {found}" for name, found in page.made_for.items()) + ".", ""]
    for note in page.notes:
        lines += [note, ""]
    lines += ["## Files", "", "| file | what it is |", "| --- | --- |"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in page.files.items()]
    if page.rows:
        lines += [f"| `{file.name}` | {_rows(file, trained)}, {shown_size(file.size)} |" for file in page.rows]
    if page.limits:
        lines += ["", "## What it cannot express", ""]
        lines += [f"- {limit}" for limit in page.limits]
    return "\n".join(lines) + "\n"


def code(value: Any) -> str:
    """A value that may be anybody's as inline code of a page: one line, and no way out of it."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    shown = "".join(c if c.isprintable() and c != "`" else " " for c in text)
    return f"`{shown.strip() or ' '}`"


def code_cell(value: Any) -> str:
    """The same in a cell of a table, where a bar would end the cell, though it stands in code."""
    return code(value).replace("|", "\\|")


def _table(trained: Trained) -> list[str]:
    figures = {
        "run": trained.spec.name,
        "trial": f"{trained.trial} ({trained.row['state']})",
        "steps trained": trained.steps,
        "steps that the schedule spans": trained.planned_steps,
        "rows a step": trained.rows_per_step,
        "base": trained.spec.base.model,
        "rank, alpha": f"{trained.config.lora.rank}, {trained.alpha}",
        "target modules": trained.config.lora.target_modules,
        "learning rate": f"{trained.config.training.learning_rate:.6g}",
        "seed": trained.config.training.seed,
    }
    if trained.eval_loss is not None:
        figures["validation loss, nats a token"] = f"{trained.eval_loss:.4f}"
    return ["| | |", "| --- | --- |", *(f"| {name} | {code_cell(value)} |" for name, value in figures.items())]


def _rows(file: RowFile, trained: Trained) -> str:
    meaning = {
        "train.jsonl": "rows of the train split",
        "validation.jsonl": "rows of the validation split, on which trials were compared",
        "test.jsonl": "rows of the test split, which the sweep touched once, at its end",
    }[file.name]
    return f"{file.rows:,} {meaning}: token ids and labels"


def shown_size(size: int) -> str:
    unit, name = (1e3, "kB") if size < 1e6 else (1e6, "MB") if size < 1e9 else (1e9, "GB")
    return f"{size / unit:,.1f} {name}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
