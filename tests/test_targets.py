"""Target sets: resolved against a model's real modules, and counted as PEFT counts."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from conftest import SHARED, make_spec, shared
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_search.errors import InputError
from lora_search.targets import (
    TARGET_SETS,
    ModuleTree,
    Targets,
    available_sets,
    experts_per_token,
    module_tree,
    resolve,
    skeleton,
    target_table,
    trainable_parameters,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIGS = sorted(path.name for path in (SHARED / "configs").glob("*")) or ["(no shared data)"]
RANKS = (4, 64)

HIDDEN = {"hidden_size": 64, "num_hidden_layers": 2}
DENSE = HIDDEN | {
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4}
EXPERTS = DENSE | {"moe_intermediate_size": 32, "head_dim": 16}
LATENT = EXPERTS | {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
BERT = HIDDEN | {"intermediate_size": 128, "num_attention_heads": 4, "is_decoder": True}

SMALL: dict[str, dict[str, Any]] = {
    "BertConfig": BERT,
    "BloomConfig": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "CodeGenConfig": GPT | {"rotary_dim": 8},
    "CohereConfig": DENSE,
    "CTRLConfig": GPT | {"dff": 128},
    "DeepseekV3Config": LATENT,
    "DeepseekV4Config": EXPERTS | {"n_routed_experts": 4, "q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2},
    "Ernie4_5_MoeConfig": EXPERTS | {"moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "FalconConfig": DENSE,
    "FalconMambaConfig": HIDDEN,
    "Gemma2Config": DENSE | {"head_dim": 16},
    "Gemma3TextConfig": DENSE | {"head_dim": 16},
    "GemmaConfig": DENSE | {"head_dim": 16},
    "Glm4MoeConfig": EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "GPT2Config": GPT,
    "GPTBigCodeConfig": GPT,
    "GPTJConfig": GPT | {"rotary_dim": 8},
    "GPTNeoConfig": DENSE | {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    "GPTNeoXConfig": DENSE,
    "GptOssConfig": EXPERTS | {"num_local_experts": 4},
    "GraniteConfig": DENSE,
    "GraniteMoeConfig": DENSE | {"num_local_experts": 4},
    "JambaConfig": DENSE | {"num_experts": 4, "attn_layer_offset": 1, "attn_layer_period": 2},
    "JetMoeConfig": DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
    "LlamaConfig": DENSE,
    "Llama4TextConfig": EXPERTS | {"num_local_experts": 4, "intermediate_size_mlp": 128},
    "MambaConfig": HIDDEN,
    "MistralConfig": DENSE,
    "MixtralConfig": DENSE | {"num_local_experts": 4},
    "MptConfig": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "NemotronHConfig": EXPERTS | {"layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 4},
    "OlmoConfig": DENSE,
    "Olmo2Config": DENSE,
    "OlmoeConfig": DENSE | {"num_experts": 4},
    "OPTConfig": DENSE | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "PhiConfig": DENSE,
    "Phi3Config": DENSE | {"pad_token_id": 0},
    "PhimoeConfig": DENSE | {"num_local_experts": 4},
    "Qwen2Config": DENSE,
    "Qwen2MoeConfig": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "Qwen3Config": DENSE | {"head_dim": 16},
    "Qwen3MoeConfig": EXPERTS | {"num_experts": 4},
    "Qwen3NextConfig": EXPERTS | {"num_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
    "RecurrentGemmaConfig": DENSE | {"block_types": ["recurrent", "attention"], "lru_width": 64},
    "StableLmConfig": DENSE,
    "Starcoder2Config": DENSE,
}

QUERY_AND_VALUE = {
    "BertConfig": {"query", "value"},
    "BloomConfig": {"query_key_value"},
    "CodeGenConfig": {"qkv_proj"},
    "CTRLConfig": {"Wq", "Wv"},
    "DeepseekV3Config": {"q_b_proj", "kv_b_proj"},
    "DeepseekV4Config": {"q_b_proj", "kv_proj"},
    "FalconConfig": {"query_key_value"},
    "GPT2Config": {"c_attn"},
    "GPTBigCodeConfig": {"c_attn"},
    "GPTNeoXConfig": {"query_key_value"},
    "JetMoeConfig": {"kv_proj"},
    "MptConfig": {"Wqkv"},
    "Phi3Config": {"qkv_proj"},
    "Qwen3NextConfig": {"q_proj", "v_proj", "in_proj_qkvz"},
}
"""By architecture, where it is not q_proj and v_proj."""

ATTENTION = {
    "BertConfig": {"query", "key", "value", "dense"},
    "GPT2Config": {"c_attn", "c_proj"},
    "GPTNeoXConfig": {"query_key_value", "dense"},
    "OPTConfig": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "PhiConfig": {"q_proj", "k_proj", "v_proj", "dense"},
    "Phi3Config": {"qkv_proj", "o_proj"},
    "LlamaConfig": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "Llama4TextConfig": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "NemotronHConfig": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "RecurrentGemmaConfig": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "DeepseekV3Config": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
}

MLP = {
    "BertConfig": {"dense"},
    "BloomConfig": {"dense_h_to_4h", "dense_4h_to_h"},
    "GPT2Config": {"c_fc", "c_proj"},
    "GptOssConfig": {"gate_up_proj", "down_proj"},
    "LlamaConfig": {"gate_proj", "up_proj", "down_proj"},
    "Llama4TextConfig": {"gate_up_proj", "gate_proj", "up_proj", "down_proj"},
    "MixtralConfig": {"gate_up_proj", "down_proj"},
    "MptConfig": {"up_proj", "down_proj"},
    "NemotronHConfig": {"up_proj", "down_proj"},
    "OPTConfig": {"fc1", "fc2"},
    "Phi3Config": {"gate_up_proj", "down_proj"},
    "Qwen2MoeConfig": {"gate_up_proj", "gate_proj", "up_proj", "down_proj"},
}

STATE_SPACE = ("MambaConfig", "FalconMambaConfig")
ROUTED = (
    "DeepseekV3Config",
    "GptOssConfig",
    "GraniteMoeConfig",
    "JetMoeConfig",
    "Llama4TextConfig",
    "MixtralConfig",
    "PhimoeConfig",
    "Qwen2MoeConfig",
    "Qwen3NextConfig",
)


def small(name: str) -> PreTrainedModel:
    """A two-layer model of an architecture, on the meta device."""
    config = getattr(transformers, name)(**(SMALL[name] | {"vocab_size": 128}))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def last_names(targets: Targets) -> set[str]:
    return {name.rpartition(".")[2] for name in (*targets.modules, *targets.parameters)}


def counted_by_peft(model: PreTrainedModel, targets: Targets) -> list[int]:
    """The oracle: put an adapter of each rank on, and count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of Conv1D, whose layout PEFT corrects itself
        for rank in RANKS:
            adapter = LoraConfig(
                r=rank,
                target_modules=list(targets.modules),
                target_parameters=list(targets.parameters) or None,
                task_type="CAUSAL_LM",
            )
            if rank == RANKS[0]:
                wrapped = get_peft_model(model, adapter, adapter_name=f"rank{rank}", low_cpu_mem_usage=True)
            else:
                wrapped.add_adapter(f"rank{rank}", adapter, low_cpu_mem_usage=True)
    return [sum(p.numel() for name, p in wrapped.named_parameters() if f".rank{rank}." in name) for rank in RANKS]


@cache
def tree_of(name: str) -> ModuleTree:
    return module_tree(skeleton(str(shared(f"configs/{name}"))))


def counted(tree: ModuleTree, targets: Targets) -> list[int]:
    return [trainable_parameters(tree, targets, rank) for rank in RANKS]


@pytest.mark.parametrize("target", TARGET_SETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_set_of_a_known_model_counts_as_peft_counts(name: str, target: str) -> None:
    tree = tree_of(name)
    targets = resolve(tree, target)
    assert counted(tree, targets) == counted_by_peft(skeleton(str(shared(f"configs/{name}"))), targets)


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
    tree = tree_of(name)
    assert trainable_parameters(tree, resolve(tree, target), rank) == count


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("llama-2-13b", 13_015_864_320),
        ("llama-3-8b", 8_030_261_248),
        ("mixtral-8x7b", 46_702_792_704),
        ("phi-2", 2_779_683_840),
    ],
)
def test_base_has_its_published_number_of_parameters(name: str, count: int) -> None:
    """Shared weights once, as the output head and the embedding of gpt2."""
    assert module_tree(skeleton(str(shared(f"configs/{name}")))).total_parameters == count


@pytest.mark.parametrize("name", SMALL)
def test_every_set_of_an_architecture_counts_as_peft_counts(name: str) -> None:
    tree = module_tree(small(name))
    for target in available_sets(tree):
        targets = resolve(tree, target)
        assert counted(tree, targets) == counted_by_peft(small(name), targets), target


@pytest.mark.parametrize("name", SMALL)
def test_every_architecture_gives_its_sets(name: str) -> None:
    tree = module_tree(small(name))
    assert available_sets(tree) == (("all-linear",) if name in STATE_SPACE else TARGET_SETS)


@pytest.mark.parametrize("name", [name for name in SMALL if name not in STATE_SPACE])
def test_attention_qv_is_queries_and_values_alone_or_fused(name: str) -> None:
    found = last_names(resolve(module_tree(small(name)), "attention-qv"))
    assert found == QUERY_AND_VALUE.get(name, {"q_proj", "v_proj"})


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_its_projections(name: str) -> None:
    assert last_names(resolve(module_tree(small(name)), "attention")) == ATTENTION[name]


@pytest.mark.parametrize("name", MLP)
def test_mlp_is_feed_forward_and_experts(name: str) -> None:
    targets = resolve(module_tree(small(name)), "mlp")
    assert last_names(targets) == MLP[name]
    assert not [found for found in (*targets.modules, *targets.parameters) if "attn" in found or "attention" in found]


@pytest.mark.parametrize("name", SMALL)
def test_sets_lie_within_each_other(name: str) -> None:
    tree = module_tree(small(name))
    sets: dict[str, set[str]] = {target: set() for target in TARGET_SETS}
    for target in available_sets(tree):
        targets = resolve(tree, target)
        sets[target] = {*targets.modules, *targets.parameters}
    assert sets["attention-qv"] <= sets["attention"]
    assert not sets["attention"] & sets["mlp"]
    assert sets["attention"] | sets["mlp"] <= sets["all-linear"]


@pytest.mark.parametrize("name", SMALL)
def test_output_head_and_routers_are_never_a_target(name: str) -> None:
    model = small(name)
    tree = module_tree(model)
    head = model.get_output_embeddings()
    everything = resolve(tree, r".*")
    assert not [found for found in everything.modules if model.get_submodule(found) is head]
    assert not [
        found
        for found in (*everything.modules, *everything.parameters)
        if {"gate", "router", "shared_expert_gate", "lm_head", "embed_out"} & {*found.split(".")}
    ]


@pytest.mark.parametrize("name", ROUTED)
def test_routers_are_found(name: str) -> None:
    assert module_tree(small(name)).routers


@pytest.mark.parametrize("target", [["lm_head"], ["q_proj", "lm_head"], "re:lm_head", r".*\.(q_proj)|lm_head"])
def test_naming_the_output_head_is_refused(target: Any) -> None:
    with pytest.raises(InputError, match=r"the output head of LlamaForCausalLM .* never adapted"):
        resolve(module_tree(small("LlamaConfig")), target)


@pytest.mark.parametrize("target", [["gate"], ["model.layers.0.mlp.gate"], r"re:.*\.gate"])
def test_naming_a_router_is_refused(target: Any) -> None:
    with pytest.raises(InputError, match="a router, which is never adapted"):
        resolve(module_tree(small("MixtralConfig")), target)


def test_what_peft_does_not_adapt_is_in_no_set() -> None:
    """PEFT takes the dense layers' projections of DeepSeek for those of the experts, whose rank it then doubles."""
    tree = module_tree(small("DeepseekV3Config"))
    assert {module.last for module in tree.refused} == {"gate_proj", "up_proj", "down_proj"}
    assert resolve(tree, "mlp") == Targets(
        (), ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")
    )
    with pytest.raises(InputError, match="'up_proj' is a module that PEFT does not adapt in DeepseekV3ForCausalLM"):
        resolve(tree, ["up_proj"])


def test_linear_layers_that_take_their_input_by_groups_are_in_no_set() -> None:
    tree = module_tree(small("DeepseekV4Config"))
    assert {module.last for module in tree.refused} >= {"o_a_proj"}
    assert "o_a_proj" not in {name.rpartition(".")[2] for name in resolve(tree, "attention").modules}
    falcon = module_tree(small("FalconConfig"))  # whose linear layers are of a class of their own too
    assert "query_key_value" in {module.last for module in falcon.modules}


@pytest.mark.parametrize("name", STATE_SPACE)
def test_model_without_attention_says_what_it_has(name: str) -> None:
    tree = module_tree(small(name))
    for target in ("attention-qv", "attention", "mlp"):
        with pytest.raises(InputError, match=rf"'{target}' is not available: .* has no .*sets all-linear .*in_proj"):
            resolve(tree, target)
    assert "out_proj" not in last_names(resolve(tree, "all-linear"))  # PEFT raises for it


def test_towers_are_in_no_set_but_can_be_named() -> None:
    """Text gives the modules that read images no gradient."""
    config = transformers.Gemma3Config(
        text_config=SMALL["Gemma3TextConfig"] | {"vocab_size": 128},
        vision_config=HIDDEN | {"intermediate_size": 64, "num_attention_heads": 4, "image_size": 32, "patch_size": 16},
        mm_tokens_per_image=4,
    )
    with torch.device("meta"):
        tree = module_tree(AutoModelForCausalLM.from_config(config))
    assert len(resolve(tree, "attention").modules) == 8
    assert not [name for target in TARGET_SETS for name in resolve(tree, target).modules if "vision" in name]
    assert resolve(tree, r".*vision_tower.*q_proj").modules


@pytest.mark.parametrize(
    ("target", "count"),
    [
        (["q_proj"], 2),
        (["layers.0.self_attn.q_proj"], 1),
        (["model.layers.1.mlp.up_proj", "down_proj"], 3),
        (r".*layers\.0\.(self_attn|mlp)\..*", 7),
        (r"re:.*\.[kv]_proj", 4),
        (r".*", 14),
    ],
)
def test_lists_and_regular_expressions_name_modules(target: Any, count: int) -> None:
    assert len(resolve(module_tree(small("LlamaConfig")), target).modules) == count


@pytest.mark.parametrize("target", [["gate_up_proj"], ["experts.gate_up_proj"], r".*gate_up_proj"])
def test_experts_are_named_as_modules_are(target: Any) -> None:
    targets = resolve(module_tree(small("MixtralConfig")), target)
    assert targets == Targets((), tuple(f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (0, 1)))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("attention_qv", "did you mean 'attention-qv'"),
        ("q_proj", "did you mean the list [q_proj]"),
        (["q_prj"], "did you mean 'q_proj'"),
        (["q_proj", "query"], "'query' matches no module of LlamaForCausalLM"),
        ([], "found an empty list"),
        ("re:(q", "no valid regular expression"),
        ("re:nothing", "matches no module"),
    ],
)
def test_target_that_is_not_there_is_said_with_what_is(target: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(module_tree(small("LlamaConfig")), target)
    assert said in str(caught.value)
    assert "it has the sets attention-qv, attention, mlp, all-linear and the modules q_proj (64x64)" in str(
        caught.value
    )
    assert "gate_proj (128x64)" in str(caught.value)


def test_modules_of_one_name_are_offered_with_all_their_shapes() -> None:
    with pytest.raises(InputError, match=r"c_proj \(64x64, 64x256\)"):
        resolve(module_tree(small("GPT2Config")), ["q_proj"])


def test_quantised_base_gives_the_same_tree(tiny: Path) -> None:
    from lora_search.model import load_base

    spec = make_spec(tiny)
    quantised, plain = module_tree(load_base(spec.base, "cpu").model), module_tree(skeleton(spec.base.model))
    assert quantised == plain


@pytest.mark.parametrize("name", ["GPT2Config", "MixtralConfig", "Phi3Config"])
def test_quantised_model_of_another_architecture_gives_the_same_names(name: str, tmp_path: Path) -> None:
    """Conv1D becomes Linear4bit, and fused experts stay as they are."""
    config = getattr(transformers, name)(**(SMALL[name] | {"vocab_size": 128}))
    AutoModelForCausalLM.from_config(config).save_pretrained(str(tmp_path))
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantised = module_tree(
        AutoModelForCausalLM.from_pretrained(str(tmp_path), quantization_config=nf4, device_map={"": "cpu"})
    )
    plain = module_tree(skeleton(str(tmp_path)))
    assert quantised.total_parameters == plain.total_parameters
    for target in TARGET_SETS:
        assert resolve(quantised, target) == resolve(plain, target)
        assert counted(quantised, resolve(quantised, target)) == counted(plain, resolve(plain, target))


def test_skeleton_holds_no_weights(tmp_path: Path) -> None:
    """A folder with nothing but a config.json, or that file."""
    transformers.LlamaConfig(**DENSE).save_pretrained(str(tmp_path))
    for source in (tmp_path, tmp_path / "config.json"):
        assert {parameter.device.type for parameter in skeleton(str(source)).parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("./nowhere", "there is no ./nowhere"),
        ("/nowhere/config.json", "there is no /nowhere/config.json"),
        ("a/folder/deeper", "there is no a/folder/deeper"),
        ("builtin:none", "builtin:demo"),
        ("/", "folder without a config.json"),
        ("not a model", "cannot read a configuration from 'not a model'"),
    ],
)
def test_model_that_is_not_there_is_said(model: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        skeleton(model)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_id_without_a_network_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot read a configuration from 'nobody/nothing'"):
        skeleton("nobody/nothing")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "vit"}, r"\(vit\) is no causal language model"),
        (
            {"model_type": "x", "auto_map": {"AutoConfig": "x.X"}},
            "runs code of its own, which base.trust_remote_code: true",
        ),
        ({"model_type": "unheard_of"}, "cannot read a configuration from .* model type `unheard_of`"),
        ({}, "cannot read a configuration from"),
        ({"model_type": "llama", "num_attention_heads": 0}, r"cannot (read|build)"),
    ],
)
def test_model_that_is_no_causal_model_is_said(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said) as caught:
        skeleton(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_table_sizes_sets_and_gives_reasons() -> None:
    tree = module_tree(small("MambaConfig"))
    table = target_table("tiny", tree)
    reasons = {row.name: row.unavailable for row in table.sets}
    assert reasons["all-linear"] is None
    assert reasons["attention"] == "MambaForCausalLM has no attention"
    everything = table.sets[-1]
    assert set(everything.trainable) == {4, 8, 16, 32, 64}
    assert everything.trainable[8] == trainable_parameters(tree, resolve(tree, "all-linear"), 8)
    assert everything.share[8] == everything.trainable[8] / tree.total_parameters
    assert table.refused == ("out_proj",)


@pytest.mark.parametrize("name", ["MixtralConfig", "DeepseekV3Config", "MambaConfig"])
def test_command_fits_80_columns_and_prints_one_document(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_search.cli.targets import targets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    getattr(transformers, name)(**(SMALL[name] | {"vocab_size": 128})).save_pretrained("base")
    capfd.readouterr()
    targets("base", as_json=False)
    shown = capfd.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "\x1b" not in shown
    targets("base", as_json=True)
    rows = {row["name"]: row for row in json.loads(capfd.readouterr().out)["sets"]}
    assert f"{rows['all-linear']['trainable']['16']:,}" in shown
    assert all(row["unavailable"] or row["suffixes"] for row in rows.values())


@pytest.mark.parametrize(
    ("model_type", "given"),
    [
        ("mixtral", {"num_experts_per_tok": 3}),
        ("gemma4_text", {"top_k_experts": 3}),
        ("ernie4_5_moe", {"moe_k": 3}),
        ("hunyuan_v1_moe", {"moe_topk": [1, 3]}),
        ("dbrx", {"ffn_config": {"moe_top_k": 3}}),
    ],
)
def test_experts_of_a_token_are_counted_whatever_they_are_called(model_type: str, given: dict[str, Any]) -> None:
    assert experts_per_token(transformers.CONFIG_MAPPING[model_type](**given)) == 3
    assert experts_per_token(transformers.LlamaConfig()) == 1
