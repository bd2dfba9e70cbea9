"""What the exported Python scripts share: their values, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_search.export.fill import fill, plain_yaml, python
from lora_search.export.material import Material, RowFile
from lora_search.export.trained import Trained

SCRIPT = "train.py"

FILES = {
    SCRIPT: "the script; writes `adapter/` in PEFT's format, and `result.json`",
}

BASE_FILE = {"base/": "the built-in base, in Hugging Face format"}


def write_script(template: str, trained: Trained, material: Material, out: Path) -> list[RowFile]:
    """Write a script, and the rows that it reads; those."""
    parts = {"where": where(trained, material.copy_base(out)), "checkpointing": _checkpointing(trained)}
    (out / SCRIPT).write_text(fill(template, values(trained, material), parts), encoding="utf-8")
    return material.write_rows(out)


def values(trained: Trained, material: Material) -> dict[str, Any]:
    """What the templates have places for."""
    base, lora, training = trained.spec.base, trained.config.lora, trained.config.training
    return {
        "base": base.model,
        "revision": base.revision,
        "trust_remote_code": base.trust_remote_code,
        "nf4": base.quantization == "nf4",
        "compute_dtype": base.compute_dtype,
        "gradient_checkpointing": base.gradient_checkpointing,
        "rank": lora.rank,
        "alpha": trained.alpha,
        "dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": material.module_names(),
        "target_parameters": material.parameter_names() or None,
        "steps": trained.steps,
        "planned_steps": trained.planned_steps,
        "warmup_steps": trained.warmup_steps,
        "max_length": trained.spec.data.max_length,
        "eval_loss": trained.eval_loss,
        **training.model_dump(exclude={"steps", "warmup_ratio", "optimizer"}),
    }


def where(trained: Trained, folder: str | None) -> str:
    """The line of a script that says where the base is."""
    return f"BASE = {python(trained.spec.base.model)}\n" if folder is None else f"BASE = str(HERE / {python(folder)})\n"


def _checkpointing(trained: Trained) -> str:
    """Always written out: SFTConfig recomputes activations unless told not to."""
    if not trained.spec.base.gradient_checkpointing:
        return "    gradient_checkpointing=False,\n"
    return '    gradient_checkpointing=True,\n    gradient_checkpointing_kwargs={"use_reentrant": False},\n'


def base_path(trained: Trained, folder: str | None) -> str:
    """Where the base is, as a configuration that is read in its own folder says it."""
    return trained.spec.base.model if folder is None else f"./{folder}"


def revision_line(key: str, revision: str | None) -> str:
    return "" if revision is None else f"{key}: {plain_yaml(revision)}\n"


def base_file(trained: Trained) -> dict[str, str]:
    return BASE_FILE if trained.spec.base.model.startswith("builtin:") else {}


def common_limits(trained: Trained) -> list[str]:
    """What no other trainer can repeat, whichever it is."""
    found = []
    if trained.config.lora.dropout:
        found.append(
            "The masks of the adapter's dropout come from torch's generator; lora-search draws them from the trial's "
            "seed, step and layer. The probability is the same, the masks are not, and the loss differs by chance."
        )
    if trained.stopped_early:
        found.append(
            f"The trial was trained for {trained.steps} of {trained.planned_steps} steps: {_why(trained)}. The "
            f"learning-rate schedule spans {trained.planned_steps} steps here too, and training ends after "
            f"{trained.steps}."
        )
    if trained.spec.base.compute_dtype == "auto":
        found.append(
            "`compute_dtype: auto` follows the device, as in the sweep: on another kind of device than the sweep's, "
            "products are rounded differently."
        )
    if trained.spec.base.compute_dtype == "float16":
        found.append("transformers scales the loss of float16 training (GradScaler); lora-search does not.")
    if Path(trained.spec.base.model).is_absolute():
        found.append("The base is a folder of the machine that the export was made on; edit its path on another one.")
    return found


def foreign_limits(tool: str) -> list[str]:
    """What a trainer that sets the adapter up by itself does otherwise."""
    return [
        f"{tool} draws the adapter's first values itself, after what it has drawn before: the seed is the trial's, the "
        "values may not be.",
        f"A validation loss that {tool} tells while it trains is a mean of its batches' means; lora-search's is nats a "
        "target token over the whole split. The test split is for you: nothing here reads it.",
    ]


def rows_note(trained: Trained, rows: list[RowFile]) -> str:
    """How the rows were made, and how many of them the trial read."""
    read = trained.steps * trained.rows_per_step
    return (
        "The rows are token ids, made by lora-search from the run's data set, template, split and `max_length`; the "
        "loss counts the tokens whose label is not -100. `train.jsonl` is in the order in which the trial read it, "
        f"each begun epoch in full: the trial read the first {read:,} of its {rows[0].rows:,} rows, which training "
        "reads again unshuffled."
    )


def _why(trained: Trained) -> str:
    state = str(trained.row["state"])
    return {"stopped": "ASHA stopped it", "running": "it is still running", "failed": "it failed"}.get(state, state)
