"""Export for torchtune, whose models are its own: only what it has a builder for can be expressed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_search.errors import InputError
from lora_search.export.fill import fill, plain_yaml
from lora_search.export.material import Material
from lora_search.export.page import Page
from lora_search.export.script import base_file, base_path, common_limits, foreign_limits, rows_note, values
from lora_search.export.trained import Trained

CHECKED = {"torchtune": "0.6.1", "torchao": "0.10.0", "transformers": "5.6.0"}
FILE = "config.yaml"
COMPONENTS = "trial.py"

ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
"""torchtune's names of the modules that it can adapt one by one."""

NF4_NUMBERS = 64 * 256
"""torchao quantises a weight to NF4 only where it divides into blocks of so many numbers."""

MLP = {"gate_proj", "up_proj", "down_proj"}
"""Adapted together or not at all."""

QUANTISED = {
    (False, False): "  quantize_base: false\n",
    (True, False): "  quantize_base: true  # NF4 with double quantisation, by torchao\n",
    (True, True): "  quantize_base: false  # torchao takes no weights of these shapes; the trial's base was in NF4\n",
}


def write(trained: Trained, out: Path) -> Page:
    """A configuration of the LoRA recipe on one device, the components that it needs, and its rows.

    Raises:
        InputError: torchtune has no such architecture, or cannot adapt just these modules.
    """
    material = Material(trained)
    component, model_type, model = _model(material.base_config, trained.spec.data.max_length)
    attention, mlp = _modules(material)
    lora, training = trained.config.lora, trained.config.training
    folder = material.copy_base(out)
    quantises = trained.spec.base.quantization == "nf4"
    refused = quantises and any(size % NF4_NUMBERS for size in material.sizes())
    found = values(trained, material) | {
        "component": component,
        "model_type": model_type,
        "attention": attention,
        "mlp": mlp,
        "pad_id": material.data.pad_token_id,
        "base_path": base_path(trained, folder),
        "betas": [training.adam_beta1, training.adam_beta2],
        "clip": training.max_grad_norm or None,
        "dtype": "fp32" if trained.spec.base.compute_dtype == "float32" else "bf16",
    }
    weights = out / folder if folder else Path(trained.spec.base.model)
    files = sorted(file.name for file in weights.glob("*.safetensors")) if weights.is_dir() else []
    alpha = trained.alpha * math.sqrt(lora.rank) if lora.use_rslora else trained.alpha
    parts = {
        "quantised": QUANTISED[quantises, refused],
        "model": "".join(f"  {name}: {plain_yaml(value)}\n" for name, value in model.items()),
        "alpha": f"  lora_alpha: {plain_yaml(alpha)}"
        + ("  # rsLoRA has no key: alpha times the root of the rank\n" if lora.use_rslora else "\n"),
        "files": f"  checkpoint_files: {plain_yaml(_literal(files))}\n"
        if files
        else "  checkpoint_files: [model.safetensors]  # EDIT: as in the folder of `tune download`\n",
    }
    (out / FILE).write_text(fill("torchtune.yaml.txt", _literal(found), parts), encoding="utf-8")
    (out / COMPONENTS).write_text(fill("torchtune.py.txt", {}), encoding="utf-8")
    rows = material.write_rows(out)
    return Page(
        title="Train again with torchtune",
        commands=[f"tune run lora_finetune_single_device --config {FILE}"],
        files={FILE: "the configuration", COMPONENTS: "its components: the rows, and the schedule, by transformers"}
        | base_file(trained),
        made_for=CHECKED,
        rows=rows,
        notes=[rows_note(trained, rows)],
        limits=_limits(trained, bool(files), refused),
    )


def _literal(value: Any) -> Any:
    """Text of which OmegaConf, with which torchtune reads, fills in nothing (omegaconf.readthedocs.io, escaping)."""
    match value:
        case str():
            return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", value)
        case list():
            return [_literal(one) for one in value]
        case Mapping():
            return {key: _literal(one) for key, one in value.items()}
    return value


def _model(config: Any, max_length: int) -> tuple[str, str, dict[str, Any]]:
    """torchtune's builder, its type of checkpoint, and the builder's arguments."""
    kind = str(getattr(config, "model_type", ""))
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope_type = rope.get("rope_type", "default")
    tied = bool(config.tie_word_embeddings)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = not getattr(config, "attention_bias", False) and not getattr(config, "mlp_bias", False)
    plain = plain and head * config.num_attention_heads == config.hidden_size
    known = {("llama", "default"), ("llama", "llama3"), ("mistral", "default"), ("qwen2", "default")}
    if (kind, rope_type) not in known or not plain or (kind == "mistral" and tied):
        raise InputError(
            f"--to torchtune: it has no model like this base ({kind}, rope {rope_type}, "
            f"{'tied' if tied else 'untied'} embeddings); allowed: llama, mistral and qwen2 of the usual shapes"
        )
    arguments = {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "embed_dim": config.hidden_size,
        "intermediate_dim": config.intermediate_size,
        "max_seq_len": max_length,
        "norm_eps": config.rms_norm_eps,
        "rope_base": int(rope.get("rope_theta", 10_000)),
    }
    if kind == "qwen2":
        return "torchtune.models.qwen2.lora_qwen2", "QWEN2", arguments | {"tie_word_embeddings": tied}
    if kind == "mistral":
        return "torchtune.models.mistral.lora_mistral", "MISTRAL", arguments
    factor = int(rope.get("factor", 1))  # 1 scales nothing
    if tied:
        return "torchtune.models.llama3_2.lora_llama3_2", "LLAMA3_2", arguments | {"scale_factor": factor}
    if rope_type == "llama3":
        return "torchtune.models.llama3_1.lora_llama3_1", "LLAMA3", arguments | {"scale_factor": factor}
    return "torchtune.models.llama3.lora_llama3", "LLAMA3", arguments


def _modules(material: Material) -> tuple[list[str], bool]:
    """torchtune's words for the modules: those of attention, and whether the feed-forward modules are adapted."""
    names = material.module_names()
    unknown = [name for name in names if name not in ATTENTION and name not in MLP]
    if unknown or material.parameter_names() or (MLP & set(names) and not set(names) >= MLP):
        raise InputError(
            f"--to torchtune: it cannot adapt just {', '.join(names)[:200]}; allowed: any of {', '.join(ATTENTION)} in "
            f"all layers, and {', '.join(sorted(MLP))} together or not at all"
        )
    return [ATTENTION[name] for name in names if name in ATTENTION], set(names) >= MLP


def _limits(trained: Trained, has_weights: bool, refused: bool) -> list[str]:
    found = [line for line in common_limits(trained) if "GradScaler" not in line]
    found += foreign_limits("torchtune")
    found.append(
        "`tune validate` does not look into this folder for `trial.py`, as `tune run` does: put PYTHONPATH=. before it."
    )
    found.append("torchtune's recipe measures no validation loss; validation.jsonl is there for your own measurement.")
    found.append(
        "torchtune has one `dtype` for everything, the adapter too: in bf16 its small steps are rounded, where the "
        "trial's adapter was in float32. It quantises by torchao, in blocks of its own, and knows no dtype `auto`: "
        "the file has bf16 on CUDA; with `device=cpu dtype=fp32` it runs without a GPU."
    )
    if refused:
        found.append(
            f"torchao quantises to NF4 only weights whose numbers divide by {NF4_NUMBERS:,}; some of this base do not, "
            "so it is trained unquantised here, where the trial's base was in NF4."
        )
    if trained.spec.base.compute_dtype == "float16":
        found.append("The recipe refuses fp16, in which the trial was trained; bf16 stands for it.")
    if trained.config.lora.use_rslora:
        found.append("torchtune has no rsLoRA: `lora_alpha` is alpha times the root of the rank, the same scaling.")
    if not has_weights:
        found.append(
            "torchtune reads weights from a folder: `tune download` the base there, and edit `checkpoint_dir` and "
            "`checkpoint_files`."
        )
    return found
