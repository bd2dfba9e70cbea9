"""The model card of a merged model."""

from __future__ import annotations

from pathlib import Path

import yaml

from lora_search.errors import cell
from lora_search.merge.update import adapter_config
from lora_search.merge.values import Merged
from lora_search.spec import Base

ROWS = ("r", "lora_alpha", "use_rslora", "target_modules", "target_parameters", "modules_to_save")


def merged_card(base: Base, adapter: Path, merged: Merged) -> str:
    """What was merged into what, and what was measured of it."""
    config = adapter_config(adapter)
    quantised = "4-bit NF4 with double quantisation" if base.quantization == "nf4" else "unquantised"
    lines = [
        "---",
        yaml.safe_dump({"base_model": base.model}, width=10**9).rstrip(),
        "base_model_relation: finetune",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [lora, merged, lora-search]",
        "---",
        "",
        f"# {' '.join(base.model.split())} with a LoRA adapter merged into it",
        "",
        f"The adapter was trained on the base as {quantised}, and is merged onto the {merged.onto} weights.",
        *(f"Note: {note}." for note in merged.notes),
        "",
        *_measured(merged),
        "",
        "| adapter | |",
        "| --- | --- |",
        *(f"| {name} | {_value(config[name])} |" for name in ROWS if config.get(name)),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _measured(merged: Merged) -> list[str]:
    if merged.check is None or merged.adapter_loss is None or merged.drift is None:
        return ["**Not verified**: nothing was measured of this model after it was written."]
    same = merged.check.same_weights
    return [
        "| validation loss, nats a token | |",
        "| --- | --- |",
        f"| adapter on its own base | {merged.adapter_loss:.4f} |",
        *(f"| merged onto the {way} weights | {loss:.4f} |" for way, loss in merged.losses.items()),
        "",
        f"Over {same.targets:,} held-out tokens its logits differ from those of the base (the {merged.onto} weights) "
        f"with the adapter by {same.mean:.2g} on average and {same.largest:.2g} at most; their standard deviation is "
        f"{same.spread:.3g}.",
    ]


def _value(value: object) -> str:
    return cell(", ".join(map(str, sorted(value))) if isinstance(value, list) else str(value))
