"""Export as a sweep file of our own."""

from __future__ import annotations

from pathlib import Path

from lora_search.best import write_config
from lora_search.export.page import Page, installed
from lora_search.export.trained import Trained

FILE = "sweep.yaml"


def write(trained: Trained, out: Path) -> Page:
    """A sweep of one trial."""
    write_config(trained.spec, trained.row, out / FILE)
    limits = []
    if trained.stopped_early:
        limits.append(
            f"A sweep of one trial is stopped by nobody: it trains all {trained.planned_steps} steps of the schedule, "
            f"where the trial was trained for {trained.steps}. Its report at step {trained.steps}, if it is one of "
            "its report steps, is the trial's own."
        )
    return Page(
        title="A sweep of one trial",
        commands=[f"lora-search run {FILE}"],
        files={FILE: "the sweep file; its paths are those of the run"},
        made_for=installed("lora-search", "torch", "transformers", "peft", "bitsandbytes"),
        limits=limits,
    )
