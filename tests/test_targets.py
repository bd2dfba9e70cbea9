"""Target sets: resolved against a model's real modules, and counted as PEFT counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from conftest import SHARED, make_spec, shared
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_search.errors import InputError
from lora_search.spec import TARGET_SETS
from lora_search.targets import ModuleTree, Targets, module_tree, resolve, skeleton, target_table, trainable_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIGS = sorted(path.name for path in (SHARED / "configs").glob("*")) or ["(no shared data)"]

SMALL: dict[str, dict[str, Any]] = {
    "BloomConfig": {"n_layer": 2, "n_head": 4},
    "CohereConfig": {},
    "FalconConfig": {},
    "GemmaConfig": {"head_dim": 16},
    "Gemma2Config": {"head_dim": 16},
    "Gemma3TextConfig": {"head_dim": 16},
    "GPTBigCodeConfig": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "GPTJConfig": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    "GPTNeoXConfig": {},
    "GraniteConfig": {},
    "LlamaConfig": {},
    "MistralConfig": {},
    "MptConfig": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "OlmoConfig": {},
    "Olmo2Config": {},
    "OPTConfig": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "PhiConfig": {},
    "Phi3Config": {"pad_token_id": 0},
    "Qwen2Config": {},
    "Qwen3Config": {"head_dim": 16},
    "StableLmConfig": {},
    "Starcoder2Config": {},
    "MixtralConfig": {"num_local_experts": 4},
    "Qwen2MoeConfig": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "Qwen3MoeConfig": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "OlmoeConfig": {"num_experts": 4},
    "GptOssConfig": {"num_local_experts": 4, "head_dim": 16},
    "DeepseekV3Config": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
}


def small(name: str) -> PreTrainedModel:
    """A two-layer model of an architecture, on the meta device."""
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    own = {key for key in SMALL[name] if key.startswith(("n_", "d_")) and key not in ("n_routed_experts", "n_group")}
    common = {} if own else sizes
    config = getattr(transformers, name)(**(common | SMALL[name] | {"vocab_size": 128}))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def counted_by_peft(model: PreTrainedModel, targets: Targets, rank: int) -> int:
    """The oracle: put the adapter on and count."""
    adapter = LoraConfig(
        r=rank,
        lora_dropout=0.0,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, adapter, low_cpu_mem_usage=True)
    return sum(p.numel() for name, p in wrapped.named_parameters() if "lora_" in name)


def available(tree: ModuleTree) -> list[str]:
    return [row.name for row in target_table("model", tree).sets if row.unavailable is None]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_set_of_a_known_model_counts_as_peft_counts(name: str) -> None:
    folder = shared(f"configs/{name}")
    tree = module_tree(skeleton(str(folder)))
    assert available(tree) == list(TARGET_SETS)
    targets = resolve(tree, "all-linear")
    assert trainable_parameters(tree, targets, 8) == counted_by_peft(skeleton(str(folder)), targets, 8)


@pytest.mark.parametrize(
    ("name", "target", "rank", "count"),
    [
        ("phi-2", "attention-qv", 16, 5_242_880),
        ("llama-3-8b", "attention", 16, 13_631_488),
        ("llama-3.2-3b", "attention-qv", 32, 9_175_040),
        ("gpt2", ["c_attn", "c_proj"], 16, 1_622_016),
    ],
)
def test_published_counts_are_met(name: str, target: Any, rank: int, count: int) -> None:
    tree = module_tree(skeleton(str(shared(f"configs/{name}"))))
    assert trainable_parameters(tree, resolve(tree, target), rank) == count


@pytest.mark.parametrize("name", SMALL)
def test_every_set_of_an_architecture_counts_as_peft_counts(name: str) -> None:
    tree = module_tree(small(name))
    sets = available(tree)
    assert set(sets) == set(TARGET_SETS), [module.name for module in tree.modules]
    for target in sets:
        if name == "DeepseekV3Config" and target in ("mlp", "all-linear"):
            # PEFT 0.21 takes the dense layers' gate_proj and up_proj for those of the fused experts and drops them
            # (peft/utils/transformers_weight_conversion.py, _convert_peft_config_moe).
            continue
        targets = resolve(tree, target)
        assert trainable_parameters(tree, targets, 4) == counted_by_peft(small(name), targets, 4), target


@pytest.mark.parametrize("name", SMALL)
def test_sets_lie_within_each_other(name: str) -> None:
    tree = module_tree(small(name))
    sets = {target: {*resolve(tree, target).modules, *resolve(tree, target).parameters} for target in TARGET_SETS}
    assert sets["attention-qv"] < sets["attention"] or sets["attention-qv"] == sets["attention"]
    assert not sets["attention"] & sets["mlp"]
    assert sets["attention"] | sets["mlp"] <= sets["all-linear"]


@pytest.mark.parametrize("name", SMALL)
def test_output_head_and_routers_are_never_a_target(name: str) -> None:
    tree = module_tree(small(name))
    everything = resolve(tree, "all-linear")
    for found in (*everything.modules, *everything.parameters):
        assert not found.endswith(("lm_head", "embed_out", ".gate", ".router", "shared_expert_gate")), found


@pytest.mark.parametrize("target", [["lm_head"], ["q_proj", "lm_head"]])
def test_naming_the_output_head_is_refused(target: list[str]) -> None:
    with pytest.raises(InputError, match="output head"):
        resolve(module_tree(small("LlamaConfig")), target)


def test_model_without_attention_says_what_it_has() -> None:
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64)
    with torch.device("meta"):
        tree = module_tree(AutoModelForCausalLM.from_config(config))
    assert available(tree) == ["all-linear"]
    with pytest.raises(InputError, match=r"no modules for 'attention-qv'; it has the sets all-linear .*in_proj"):
        resolve(tree, "attention-qv")


@pytest.mark.parametrize(
    ("target", "count"),
    [
        (["q_proj"], 2),
        (["layers.0.self_attn.q_proj"], 1),
        (["model.layers.1.mlp.up_proj", "down_proj"], 3),
        (r".*layers\.0\.(self_attn|mlp)\..*", 7),
        (r"re:.*\.[kv]_proj", 4),
    ],
)
def test_lists_and_regular_expressions_name_modules(target: Any, count: int) -> None:
    assert len(resolve(module_tree(small("LlamaConfig")), target).modules) == count


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("attention_qv", "did you mean 'attention-qv'"),
        (["q_prj"], "did you mean 'q_proj'"),
        (["q_proj", "query"], "no module 'query'"),
        ("re:(q", "no valid regular expression"),
        ("re:nothing", "matches no module"),
    ],
)
def test_target_that_is_not_there_is_said_with_what_is(target: Any, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")) as caught:
        resolve(module_tree(small("LlamaConfig")), target)
    if "valid" not in said:
        assert "gate_proj (128x64)" in str(caught.value)


def test_quantised_base_gives_the_same_tree(tiny: Path) -> None:
    from lora_search.model import load_base

    spec = make_spec(tiny)
    quantised, plain = module_tree(load_base(spec.base, "cpu").model), module_tree(skeleton(spec.base.model))
    assert quantised.modules == plain.modules
    assert quantised.total_parameters == plain.total_parameters


@pytest.mark.parametrize("model", ["./nowhere", "builtin:none", "/"])
def test_model_that_is_not_there_is_said(model: str) -> None:
    with pytest.raises(InputError, match="MODEL"):
        skeleton(model)


def test_model_that_is_no_causal_model_is_said(tmp_path: Path) -> None:
    transformers.ViTConfig().save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="no causal language model"):
        skeleton(str(tmp_path))
