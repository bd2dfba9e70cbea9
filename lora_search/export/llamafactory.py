"""Export for LLaMA-Factory."""

from __future__ import annotations

from pathlib import Path

from lora_search.errors import InputError
from lora_search.export.fill import fill
from lora_search.export.material import Material
from lora_search.export.page import Page
from lora_search.export.script import (
    SCRIPT,
    base_file,
    base_path,
    common_limits,
    foreign_limits,
    revision_line,
    rows_note,
    values,
)
from lora_search.export.trained import Trained

CHECKED = "0.9.5"
FILE = "config.yaml"

NF4 = """\
quantization_method: bnb
quantization_bit: 4
quantization_type: nf4
double_quantization: true
"""


def write(trained: Trained, out: Path) -> Page:
    """A configuration, the script that runs it, and its rows.

    Raises:
        InputError: the trial adapts the fused weights of experts, for which LLaMA-Factory has no key.
    """
    material, base = Material(trained), trained.spec.base
    if material.parameter_names():
        raise InputError(
            "--to llamafactory: the trial adapts experts' fused weights, for which LLaMA-Factory has no key; "
            "allowed: trl, transformers, axolotl, unsloth, peft, yaml"
        )
    found = values(trained, material) | {
        "base_path": base_path(trained, material.copy_base(out)),
        "lora_target": ",".join(material.module_names()),
        "bf16": base.compute_dtype in ("auto", "bfloat16"),
        "fp16": base.compute_dtype == "float16",
        "no_checkpointing": not base.gradient_checkpointing,
    }
    steps = f"max_steps: {trained.planned_steps}\n"
    if trained.stopped_early:
        steps = f"# The schedule spans these steps; train.py ends training after {trained.steps}.\n{steps}"
    parts = {
        "revision": revision_line("model_revision", base.revision),
        "quantisation": NF4 if base.quantization == "nf4" else "",
        "steps": steps,
    }
    (out / FILE).write_text(fill("llamafactory.yaml.txt", found, parts), encoding="utf-8")
    (out / SCRIPT).write_text(fill("llamafactory.py.txt", found), encoding="utf-8")
    rows = material.write_rows(out)
    files = {FILE: "the configuration", SCRIPT: "prepares the rows and trains, as far as the trial was trained"}
    return Page(
        title="Train again with LLaMA-Factory",
        commands=[f"python {SCRIPT}"],
        files=files | base_file(trained),
        made_for={"llamafactory": CHECKED},
        rows=rows,
        notes=[rows_note(trained, rows)],
        limits=[
            *common_limits(trained),
            *foreign_limits("LLaMA-Factory"),
            f"`llamafactory-cli train {FILE}` reads the same configuration once {SCRIPT} has made `tokenized/`, but "
            f"trains all {trained.planned_steps} steps, and does not choose `bf16` by the device.",
            "It pads to multiples of 8 tokens; padding counts neither in attention nor in the loss.",
        ],
    )
