"""Merged shard by shard, a model of every family is, number by number, its base with the adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import SHARED, shared
from gguf_models import DEEPSEEK_V4

from lora_search.builtin import model_folder
from lora_search.merge.published import published_weights
from lora_search.merge.shards import ShardMerge
from lora_search.merge.surroundings import read_config, write_config
from lora_search.model import load_base
from lora_search.spec import Base
from lora_search.targets.skeleton import skeleton

CPU = torch.device("cpu")
IDS = torch.arange(3, 27).reshape(2, 12) * 7 % 61

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """An architecture, made small, and what of it is adapted."""

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})
    like: str | None = None
    """A published configuration whose other values are taken, where the shared material is beside the project."""


PER_LAYER_OR_SIZE = ("dtype", "torch_dtype", "architectures", "layer_types", "max_window_layers")
"""What a published configuration says of its own size or weights."""

EXPERTS = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}

FAMILIES = {
    "llama": Family("llama", like="llama-3-8b"),
    "llama tied": Family("llama", {"tie_word_embeddings": True}, like="llama-3.2-3b"),
    "mistral rslora": Family("mistral", {}, {"target_modules": "all-linear", "use_rslora": True}, like="mistral-7b"),
    "qwen2 tied biases": Family("qwen2", {"tie_word_embeddings": True}, like="qwen2.5-0.5b"),
    "gpt2 Conv1D": Family(
        "gpt2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": None},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        like="gpt2",
    ),
    "phi-3 fused": Family("phi3", {"num_key_value_heads": 4, "rope_scaling": None}, like="phi-3-mini"),
    "phi-2 biases": Family("phi", {"num_key_value_heads": 4}, like="phi-2"),
    "pythia fused biases": Family("gpt_neox", like="pythia-1.4b"),
    "gemma2 tied": Family("gemma2", {"head_dim": 16}),
    "mixtral experts": Family("mixtral", {"num_local_experts": 4}, EXPERTS, like="mixtral-8x7b"),
    "mixtral attention": Family("mixtral", {"num_local_experts": 4}, like="mixtral-8x7b"),
    "qwen3-moe experts": Family(
        "qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}, EXPERTS
    ),
    "deepseek-v4 of single numbers": Family("deepseek_v4", DEEPSEEK_V4, {"target_modules": ["q_a_proj", "q_b_proj"]}),
    "gpt-oss experts": Family("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}, EXPERTS),
    "pattern of ranks": Family(
        "llama",
        {},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
    ),
    "DoRA": Family("llama", {}, {"target_modules": "all-linear", "use_dora": True}),
    "trained biases": Family("qwen2", {}, {"target_modules": ["q_proj"], "bias": "all"}),
    "head trained whole": Family("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied head trained whole": Family(
        "llama", {"tie_word_embeddings": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    ),
    "tied head adapted": Family("llama", {"tie_word_embeddings": True}, {"target_modules": ["q_proj", "lm_head"]}),
    "embedding adapted": Family("llama", {}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embedding adapted": Family("qwen2", {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"]}),
}


def write_base(family: Family, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of a family, in shards of at most 60 kB."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    values: dict[str, Any] = {}
    published = SHARED / "configs" / str(family.like) / "config.json"
    if published.is_file():
        values = json.loads(published.read_text())
        values = {key: value for key, value in values.items() if key not in PER_LAYER_OR_SIZE}
    config = CONFIG_MAPPING[family.model_type](**(values | SMALL | dict(family.config)))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.05)  # zero at first, by which a mistake would not show
    model.to(dtype).save_pretrained(str(folder), max_shard_size="60KB")
    return folder


def write_adapter(base: Path, lora: Mapping[str, Any], folder: Path) -> Path:
    """A random adapter, of which every part matters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | dict(lora)
    adapted = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.02 if parameter.ndim > 1 else 0.05))
    adapted.save_pretrained(str(folder))
    return folder


def adapted_logits(
    base: Path, adapter: Path, quantization: Literal["none", "nf4"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the base alone, and with the adapter, as PEFT runs it on the base as trials train on it."""
    from peft import PeftModel

    model = load_base(Base(model=str(base), quantization=quantization, compute_dtype="float32"), CPU).model.eval()
    with torch.no_grad():
        alone = model(IDS).logits.float()
        return alone, PeftModel.from_pretrained(model, str(adapter)).eval()(IDS).logits.float()


def merge(base: Path, adapter: Path, out: Path, *, dequantized: bool = False) -> None:
    """Shard by shard, to float32."""
    out.mkdir()
    merger = ShardMerge(published_weights(base), skeleton(str(base)), adapter, CPU)
    merger.write(out, dequantized=dequantized, dtype=torch.float32, say=lambda line: None)
    write_config(read_config(base), out, dtype="float32", untied=bool(merger.untied))


def merged_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(IDS).logits.float()
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_logits_are_those_of_base_and_adapter(name: str, tmp_path: Path, record_property: Any) -> None:
    family = FAMILIES[name]
    base = write_base(family, tmp_path / "base")
    adapter = write_adapter(base, family.lora, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    require_equal(base, adapter, tmp_path / "merged", "none", record_property)
    names = {path.name for path in base.iterdir() if "safetensors" in path.name}
    assert {path.name for path in (tmp_path / "merged").iterdir() if "safetensors" in path.name} == names


@pytest.mark.parametrize("name", ["llama", "qwen2 tied biases", "gpt2 Conv1D", "phi-3 fused", "mixtral experts"])
def test_dequantized_merge_is_what_was_trained_on_nf4(name: str, tmp_path: Path, record_property: Any) -> None:
    """The base in bfloat16, as models are published: quantised from that, and summed in float32."""
    family = FAMILIES[name]
    base = write_base(family, tmp_path / "base", torch.bfloat16)
    adapter = write_adapter(base, family.lora, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged", dequantized=True)
    require_equal(base, adapter, tmp_path / "merged", "nf4", record_property)


@pytest.mark.parametrize("model", ["stories260k", "builtin:demo"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_pretrained_models_merge_as_well(
    model: str, quantization: Literal["none", "nf4"], tmp_path: Path, record_property: Any
) -> None:
    base = model_folder("demo") if model == "builtin:demo" else shared(model)
    adapter = write_adapter(base, {"target_modules": "all-linear"}, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged", dequantized=quantization == "nf4")
    require_equal(base, adapter, tmp_path / "merged", quantization, record_property)


def require_equal(
    base: Path, adapter: Path, merged: Path, quantization: Literal["none", "nf4"], record_property: Any
) -> None:
    alone, adapted = adapted_logits(base, adapter, quantization)
    apart = (merged_logits(merged) - adapted).abs()
    effect = (alone - adapted).abs().mean()
    for figure, value in {"largest": apart.max(), "mean": apart.mean(), "effect": effect, "std": adapted.std()}.items():
        record_property(figure, float(value))
    assert effect > 1e-3 * adapted.std()  # an adapter that does nothing would prove nothing
    assert apart.max() < 1e-4 * adapted.std() + 1e-5
