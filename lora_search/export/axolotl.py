"""Export for Axolotl."""

from __future__ import annotations

from pathlib import Path

from lora_search.export.fill import fill, plain_yaml
from lora_search.export.material import Material
from lora_search.export.page import Page
from lora_search.export.script import (
    base_file,
    base_path,
    common_limits,
    foreign_limits,
    revision_line,
    rows_note,
    values,
)
from lora_search.export.trained import Trained

CHECKED = "0.19.0"
FILE = "config.yaml"
PLUGIN = "stop_early.py"
ONE_GPU = "CUDA_VISIBLE_DEVICES=0"
"""The trial's batch is one device's; Axolotl would train on every GPU, with so many times as large a one."""
CHECKPOINTING = "gradient_checkpointing_kwargs: {use_reentrant: false}\n"


def write(trained: Trained, out: Path) -> Page:
    """A configuration, its rows, and a plugin where the trial was stopped before its schedule's end."""
    from lora_search.model import load_tokenizer

    material = Material(trained)
    base = trained.spec.base
    whole = max(1, round(trained.alpha))
    parameters = material.parameter_names()
    found = values(trained, material) | {
        "base_path": base_path(trained, material.copy_base(out)),
        "adapter": "qlora" if base.quantization == "nf4" else "lora",
        "bf16": "auto" if base.compute_dtype == "auto" else base.compute_dtype == "bfloat16",
        "fp16": base.compute_dtype == "float16",
    }
    steps = f"max_steps: {trained.planned_steps}\n"
    if trained.stopped_early:
        steps = (
            f"# The schedule spans {trained.planned_steps} steps; the plugin ends training after {trained.steps}.\n"
            f"{steps}plugins: [stop_early.StopEarlyPlugin]\n"
        )
        (out / PLUGIN).write_text(fill("axolotl_stop.py.txt", found), encoding="utf-8")
    parts = {
        "revision": revision_line("revision_of_model", base.revision),
        "pad": f"special_tokens:\n  pad_token: {plain_yaml(load_tokenizer(base).pad_token)}\n",
        "alpha": f"lora_alpha: {whole}\n"
        if whole == trained.alpha
        else f"lora_alpha: {whole}  # Axolotl takes whole numbers alone; the trial's was {trained.alpha!r}\n",
        "parameters": f"lora_target_parameters: {plain_yaml(parameters)}\n" if parameters else "",
        "steps": steps,
        "warmup": f"warmup_steps: {trained.warmup_steps}\n"
        if trained.warmup_steps != 1
        else "warmup_steps: 1  # Axolotl makes 2 of it\n",
        "checkpointing": CHECKPOINTING if base.gradient_checkpointing else "",
    }
    (out / FILE).write_text(fill("axolotl.yaml.txt", found, parts), encoding="utf-8")
    rows = material.write_rows(out)
    limits = [*common_limits(trained), *foreign_limits("Axolotl")]
    if whole != trained.alpha:
        limits.append(
            f"Axolotl's `lora_alpha` is a whole number: {whole} stands for {trained.alpha!r}, which makes the "
            f"adapter's scaling {whole / trained.alpha - 1:+.2%} of the trial's."
        )
    limits.append(f"The trial's batch is one device's, so that `{ONE_GPU}` stands in the command.")
    if trained.warmup_steps == 1:
        limits.append("Axolotl makes 2 of one warm-up step; the trial had one.")
    files = {FILE: "the configuration"} | base_file(trained)
    return Page(
        title="Train again with Axolotl",
        commands=[f"{ONE_GPU} {'PYTHONPATH=. ' if trained.stopped_early else ''}axolotl train {FILE}"],
        files=files | ({PLUGIN: "the plugin that ends training early"} if trained.stopped_early else {}),
        made_for={"axolotl": CHECKED},
        rows=rows,
        notes=[rows_note(trained, rows)],
        limits=limits,
    )
