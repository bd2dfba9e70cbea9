"""Export of the adapter itself."""

from __future__ import annotations

import json
from pathlib import Path

from lora_search.best import export_adapter
from lora_search.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, require_lora, step_of
from lora_search.export.page import Page, code, installed
from lora_search.export.trained import Trained

LOADER = "load.py"


def write(trained: Trained, out: Path) -> Page:
    """The adapter out of the trial's last checkpoint, and how it is loaded.

    Raises:
        InputError: the trial has no checkpoint.
        SweepError: its checkpoint is damaged, or is no LoRA adapter.
    """
    checkpoint = export_adapter(trained.run, trained.trial, out / "adapter")
    require_lora(out / "adapter")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        (out / "adapter" / name).replace(out / name)
    (out / "adapter").rmdir()
    config = json.loads((out / ADAPTER_CONFIG).read_bytes())
    step = step_of(checkpoint)
    limits = [
        "`adapter_config.json` names the base as the run's host had it; where that is a folder of another machine, "
        "give PeftModel the base yourself.",
        "The adapter was trained on the base in NF4; on the base's original weights its loss is another "
        "(`lora-search merge` measures both)."
        if trained.spec.base.quantization == "nf4"
        else "The adapter was trained on the base unquantised.",
        "How it was trained (schedule, batch, seed) is not in PEFT's format; `lora-search export --to yaml` has it.",
    ]
    if step != trained.steps:
        limits.append(f"The last whole checkpoint is of step {step}; the figures above are of step {trained.steps}.")
    return Page(
        title="A LoRA adapter",
        commands=[
            "python -c 'from peft import PeftModel; from transformers import AutoModelForCausalLM as M; "
            'PeftModel.from_pretrained(M.from_pretrained("PATH_OF_THE_BASE"), ".")\'',
        ],
        files={
            ADAPTER_CONFIG: f"PEFT's LoraConfig of the adapter of step {step}",
            ADAPTER_WEIGHTS: "its weights, in float32",
        },
        made_for=installed("peft", "transformers"),
        notes=[
            f"The base: {code(trained.spec.base.model)}; in the configuration: "
            f"{code(config.get('base_model_name_or_path'))}."
        ],
        limits=limits,
    )
