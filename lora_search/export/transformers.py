"""Export for transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

from lora_search.export.material import Material
from lora_search.export.page import Page, installed
from lora_search.export.script import FILES, SCRIPT, base_file, common_limits, rows_note, write_script
from lora_search.export.trained import Trained


def write(trained: Trained, out: Path) -> Page:
    """A script with TrainingArguments and LoraConfig, and its rows."""
    rows = write_script("transformers.py.txt", trained, Material(trained), out)
    return Page(
        title="Train again with transformers and PEFT",
        commands=[f"python {SCRIPT}"],
        files=FILES | base_file(trained),
        made_for=installed("transformers", "peft", "bitsandbytes", "torch", "datasets"),
        rows=rows,
        notes=[rows_note(trained, rows)],
        limits=[
            *common_limits(trained),
            "The Trainer's own evaluation is a mean of its batches' means; the script measures nats a target token "
            "over the whole validation split instead, once, after training.",
        ],
    )
