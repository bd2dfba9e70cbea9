"""Export for TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path

from lora_search.export.material import Material
from lora_search.export.page import Page, installed
from lora_search.export.script import FILES, SCRIPT, base_file, common_limits, rows_note, write_script
from lora_search.export.trained import Trained

CHECKED = "1.16.0"


def write(trained: Trained, out: Path) -> Page:
    """A script with SFTConfig and LoraConfig, and its rows."""
    rows = write_script("trl.py.txt", trained, Material(trained), out)
    return Page(
        title="Train again with TRL and PEFT",
        commands=[f"python {SCRIPT}"],
        files=FILES | base_file(trained),
        made_for={"trl": CHECKED} | installed("transformers", "peft", "bitsandbytes", "torch", "datasets"),
        rows=rows,
        notes=[rows_note(trained, rows)],
        limits=[
            *common_limits(trained),
            "SFTTrainer rounds the adapter of a 4-bit base to bfloat16; the script gives it back its float32 start, "
            "as the trial had it.",
            "SFTTrainer's own evaluation is a mean of its batches' means; the script measures nats a target token "
            "over the whole validation split instead, once, after training.",
            "TRL's templates and its `completion_only_loss` are not used: the labels of the rows say what counts.",
        ],
    )
