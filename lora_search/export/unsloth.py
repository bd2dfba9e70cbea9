"""Export for Unsloth."""

from __future__ import annotations

from pathlib import Path

from lora_search.export.material import Material
from lora_search.export.page import Page
from lora_search.export.script import (
    FILES,
    SCRIPT,
    base_file,
    common_limits,
    foreign_limits,
    rows_note,
    write_script,
)
from lora_search.export.trained import Trained

CHECKED = "2026.10.9"


def write(trained: Trained, out: Path) -> Page:
    """A script with FastLanguageModel and SFTConfig, and its rows."""
    rows = write_script("unsloth.py.txt", trained, Material(trained), out)
    limits = [
        *common_limits(trained),
        *foreign_limits("Unsloth"),
        "Unsloth's kernels round differently, and run on GPUs alone.",
        "Unsloth knows the architectures that it has kernels for; another base it loads through transformers, or not "
        "at all.",
    ]
    if trained.config.lora.dropout:
        limits.append("Unsloth's fast kernels need dropout 0; with the trial's dropout it takes its slower path.")
    return Page(
        title="Train again with Unsloth",
        commands=[f"python {SCRIPT}"],
        files=FILES | base_file(trained),
        made_for={"unsloth": CHECKED},
        rows=rows,
        notes=[rows_note(trained, rows)],
        limits=limits,
    )
