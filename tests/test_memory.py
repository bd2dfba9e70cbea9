"""Predicted bytes: held against the engine, against real processes, and against figures that others publish."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import SHARED, make_spec, shared, write_tiny_data
from gguf_models import DEEPSEEK_V4
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    DeepseekV4Config,
    Gemma2Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    SeedOssConfig,
)

from lora_search.engine.layers import LinearSite
from lora_search.errors import InputError
from lora_search.memory import BaseMemory, Setup, TrialShape, corners, refuse_what_never_fits, weigh
from lora_search.memory.corners import Corner, Crowd, largest, smallest
from lora_search.memory.familiar import familiar_figures
from lora_search.memory.gauge import Gauge
from lora_search.memory.live import LiveBytes
from lora_search.memory.plain import plain_step
from lora_search.memory.values import RULE_WIDTH
from lora_search.memory.weights import quantised_names
from lora_search.space import TrialConfig
from lora_search.spec.schema import Lora, Training
from lora_search.targets import resolve, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from lora_search.data import TokenizedData
    from lora_search.engine import Engine
    from lora_search.spec import SweepSpec

CONFIGS = sorted(path.name for path in (SHARED / "configs").glob("*")) or ["(no shared data)"]
RUNS = sorted(path.name for path in (SHARED / "peft-method-comparison").glob("*")) or ["(no shared data)"]
CPU = Setup("cpu", "float32")
GPU = Setup("cuda", "bfloat16")


def built(**config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    return model


def rows_of(length: int, vocabulary: int, count: int = 64) -> TokenizedData:
    """Splits of rows of one length, every token counted."""
    from lora_search.data import TokenizedData, TokenSplit

    def split(rows: int) -> TokenSplit:
        tokens = np.random.default_rng(0).integers(0, vocabulary, rows * length).astype(np.int32)
        return TokenSplit(tokens, np.ones(rows * length, np.bool_), np.arange(rows + 1) * length)

    return TokenizedData(split(count), split(16), split(8), 0, "", 0, 0)


def engine_with(spec: SweepSpec, trials: int, lora: Lora, batch: int, length: int) -> Engine:
    from lora_search.engine import Engine
    from lora_search.model import load_base

    base = load_base(spec.base, "cpu")
    engine = Engine(base, rows_of(length, base.model.config.vocab_size))
    for trial in range(trials):
        engine.admit(str(trial), TrialConfig(lora, Training(batch_size=batch, steps=8)))
    return engine


# Weights


def test_base_weighs_what_is_loaded(tiny_spec: SweepSpec) -> None:
    from lora_search.model import load_base
    from lora_search.model.precision import quantised_linears

    model = load_base(tiny_spec.base, "cpu").model
    found = weigh(skeleton(tiny_spec.base.model), CPU)
    states = [model.get_submodule(name).weight.quant_state for name in quantised_linears(model)]
    packed = sum(model.get_submodule(name).weight.numel() for name in quantised_linears(model))
    tensors = [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if p.dtype != torch.uint8)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert found.packed == packed
    assert found.constants == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert found.unquantised == rest + buffers


@pytest.mark.parametrize("name", CONFIGS)
def test_what_nf4_takes_is_what_transformers_replaces(name: str) -> None:
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    model = skeleton(str(shared("configs") / name))
    expected = quantised_names(model)
    replaced = replace_with_bnb_linear(
        model,
        modules_to_not_convert=get_keys_to_not_convert(model),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
    )
    assert expected == {name for name, module in replaced.named_modules() if isinstance(module, Linear4bit)}


def test_fused_experts_stay_as_they_are() -> None:
    weights = weigh(skeleton(str(shared("configs") / "mixtral-8x7b")), GPU)
    assert weights.unquantised > 4 * 45e9  # bitsandbytes has no 4-bit form of a layer's experts in one parameter


# The engine


def test_limits_are_the_engines_own() -> None:
    from lora_search.engine.forward import LOGIT_BYTES
    from lora_search.engine.measure import EVALUATED_TOGETHER, EVALUATION_TOKENS
    from lora_search.memory import values

    assert values.LOGIT_BYTES == LOGIT_BYTES
    assert values.EVALUATION_TOKENS == EVALUATION_TOKENS
    assert values.EVALUATED_TOGETHER == EVALUATED_TOGETHER


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("target", ["attention-qv", "all-linear"])
def test_replay_holds_what_the_engine_holds(tiny: Path, target: str, dropout: float, checkpointing: bool) -> None:
    torch.set_num_threads(1)  # one lane: all on this thread
    spec = make_spec(tiny, base={"gradient_checkpointing": checkpointing})
    measured, predicted = step_bytes(spec, Lora(rank=8, dropout=dropout, target_modules=target), 2, 4, 32)
    assert predicted == pytest.approx(measured, rel=0.05)


def test_replay_recomputes_nothing_below_the_lowest_adapted_layer(tiny: Path) -> None:
    torch.set_num_threads(1)
    spec = make_spec(tiny, base={"gradient_checkpointing": True})
    lora = Lora(rank=8, dropout=0.0, target_modules=r"re:.*layers\.1\..*")
    measured, predicted = step_bytes(spec, lora, 3, 4, 32)
    assert predicted == pytest.approx(measured, rel=0.05)


def test_replay_holds_what_the_engine_holds_on_the_demo(tiny: Path) -> None:
    torch.set_num_threads(1)
    spec = make_spec(tiny, base={"model": "builtin:demo"})
    measured, predicted = step_bytes(spec, Lora(rank=16, dropout=0.05, target_modules="all-linear"), 2, 4, 128)
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("batch", "length"), [(1, 33), (3, 21), (5, 7)])
def test_replay_holds_what_tokens_that_a_pack_adds_hold(tmp_path: Path, batch: int, length: int) -> None:
    """On a CPU a trial has 64 tokens in a pass where it has 33, 63 or 35."""
    torch.set_num_threads(1)
    spec = saved(of_family("llama"), tmp_path)
    lora = Lora(rank=8, dropout=0.0, target_modules="all-linear")
    measured, predicted = step_bytes(spec, lora, 2, batch, length)
    assert measured <= predicted <= 1.12 * measured  # attention keeps nothing of them


def step_bytes(spec: SweepSpec, lora: Lora, trials: int, batch: int, length: int, *other: Lora) -> tuple[int, int]:
    """The most that a real step held besides base and trials, and what was predicted."""
    loras = [lora] * trials + list(other)
    engine = engine_with(spec, trials, lora, batch, length)
    for index, another in enumerate(other, start=trials):
        engine.admit(str(index), TrialConfig(another, Training(batch_size=batch, steps=8)))
    names = list(engine.residents)
    engine.step(names)
    model = engine.base.model
    known = [*model.parameters(), *model.buffers()]
    for trial in engine._trials.values():
        known += [*trial.adapter.vectors, *trial.adapter.gradients]
    sites = [getattr(module.forward, "__self__", None) for module in model.modules()]
    kept = [dense for site in sites if isinstance(site, LinearSite) and (dense := site._dense_OI) is not None]
    known += kept
    shares = {name: engine._trials[name].next_shares(engine.data.train) for name in names}
    with LiveBytes(known) as live:
        for group in engine._groups(names):
            engine._accumulate({name: shares[name] for name in group})
    memory = BaseMemory(
        skeleton(spec.base.model), replace(CPU, checkpointing=spec.base.gradient_checkpointing, validation_tokens=0)
    )
    shapes = [
        TrialShape(resolve(memory.tree, lora.target_modules), lora.rank, lora.dropout > 0, batch, length)
        for lora in loras
    ]
    host = memory.host(shapes)
    assert memory._kept_dense == sum(dense.numel() * dense.element_size() for dense in kept)
    assert memory._replay.passes(length).shared == engine._packed.flat
    # Inside a kernel nobody sees what logsumexp takes; a cap's damping is seen.
    bend = engine._packed.bend
    copies = 2 if bend is not None and bend.cap is not None else 1
    return live.peak, host.activations + host.passing + host.logits * copies // 2


def test_layers_are_extrapolated_to_what_all_of_them_hold() -> None:
    config = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    few, many = (BaseMemory(built(num_hidden_layers=count, **config), GPU) for count in (3, 9))
    shapes = [TrialShape(resolve(memory.tree, "all-linear"), 4, True, 2, 32) for memory in (few, many)]
    replay = many._replay
    extrapolated = many.trial(shapes[1])
    replay._found.clear()
    replay._layers = None  # all of them, one by one
    assert many.trial(shapes[1]) == extrapolated
    assert extrapolated.activations > 2 * few.trial(shapes[0]).activations


@pytest.mark.parametrize("layers", [10, 11])
def test_layers_of_two_kinds_in_turns_are_extrapolated_too(layers: int) -> None:
    config = Gemma2Config(**of_family("gemma2").to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    few, all_of_them = on_shapes(config, GPU), on_shapes(config, GPU)
    all_of_them._replay._layers = None  # all of them, one by one
    shape = TrialShape(resolve(few.tree, "all-linear"), 4, True, 2, 32)
    assert few.host([shape]) == all_of_them.host([shape])
    every_other = TrialShape(resolve(few.tree, r".*layers\.\d*[13579]\.mlp\..*"), 4, True, 2, 32)
    assert few.host([every_other]) == all_of_them.host([every_other])


def of_family(family: str) -> PreTrainedConfig:
    """A small configuration of an architecture that goes its own way somewhere."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    mlp = {"intermediate_size": 128}
    wide = sizes | mlp | {"num_key_value_heads": 2, "vocab_size": 4000}
    match family:
        case "llama":
            return LlamaConfig(**wide)
        case "gemma2":
            return Gemma2Config(**wide, head_dim=16)
        case "cohere":
            return CohereConfig(**wide)
        case "bloom":
            return BloomConfig(**sizes)
        case "mixtral":
            experts = {"num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
            return MixtralConfig(**wide | experts | {"vocab_size": 512})
        case "jamba":
            layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}
            return JambaConfig(**sizes, **mlp, **layers, num_key_value_heads=2, mamba_d_state=8, mamba_dt_rank=8)
        case "lfm2":
            return Lfm2Config(**wide | {"hidden_size": 32}, layer_types=["conv", "full_attention"])
        case "llama4":
            experts = {"num_local_experts": 4, "intermediate_size_mlp": 128, "head_dim": 16}
            return Llama4TextConfig(**wide, **experts, attention_chunk_size=16)
        case "phimoe":
            return PhimoeConfig(**wide, num_local_experts=4, num_experts_per_tok=2)
        case "granite":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32}
            state = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "layer_types": ["mamba", "attention"]}
            return GraniteMoeHybridConfig(**wide, **experts, **state)
        case "deepseek":
            experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1}
            heads = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
            few = {"num_key_value_heads": 4, "topk_group": 1, "first_k_dense_replace": 1, "v_head_dim": 8}
            return DeepseekV3Config(**wide | few, **experts, **heads)
        case "deepseek_v4":
            rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}
            return DeepseekV4Config(**wide | DEEPSEEK_V4 | {"vocab_size": 512}, compress_rates=rates)
        case "seed_oss":
            return SeedOssConfig(**wide | {"vocab_size": 512}, head_dim=16)
        case "opt":
            return OPTConfig(**sizes, ffn_dim=128, word_embed_proj_dim=64)
        case "a window in masks alone":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            windows = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 16}
            return Qwen2MoeConfig(**wide, **experts, **windows, shared_expert_intermediate_size=32)
        case "turned by the longest row":
            rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
            return LlamaConfig(**wide, max_position_embeddings=64, rope_parameters=rope)
        case "mamba":
            return MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=100, state_size=8)
    raise ValueError(family)


def on_shapes(config: PreTrainedConfig, setup: Setup) -> BaseMemory:
    with torch.device("meta"):
        return BaseMemory(AutoModelForCausalLM.from_config(config), setup)


def saved(config: PreTrainedConfig, folder: Path) -> SweepSpec:
    """A sweep over a random model of this configuration; its logits are far from where a cap would show."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder / "model"))
    write_tiny_data(folder / "data.jsonl")
    return make_spec(folder)


def test_crowd_of_a_space_with_experts_counts_those_that_share_passes() -> None:
    """The largest of the space may be one that is trained by itself: many others in one pass take more."""
    memory = on_shapes(of_family("mixtral"), replace(CPU, validation_tokens=0))
    shapes = [TrialShape(resolve(memory.tree, target), 4, False, 64, 32) for target in ("attention", "re:.*experts.*")]
    found = [Corner("", "largest", shape) for shape in shapes]
    crowd = Crowd.of(found, memory)
    assert crowd.alone == shapes[1]
    for count in (1, 2, 8):
        assert crowd.total(count, memory) >= max(memory.host([shape] * count).total for shape in shapes)
        assert crowd.total(count + 1, memory) >= memory.host([shapes[0]] * count + [shapes[1]]).total


@pytest.mark.parametrize("targets", [("attention", "mlp"), ("attention-qv", "all-linear"), ("attention-qv", "mlp")])
def test_replay_holds_what_a_pack_of_different_targets_holds(tiny: Path, targets: tuple[str, str]) -> None:
    """A layer that one trial adapts keeps its input for the rows of all."""
    torch.set_num_threads(1)
    first, second = (Lora(rank=4, dropout=0.0, target_modules=target) for target in targets)
    measured, predicted = step_bytes(make_spec(tiny), first, 1, 4, 32, second)
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("batch", "checkpointing"), [(1, False), (16, False), (4, True)])
def test_replay_holds_what_adapted_experts_hold(tmp_path: Path, batch: int, checkpointing: bool) -> None:
    """PEFT adds an adapter of a fused weight to it anew for each pass, however many rows that has."""
    torch.set_num_threads(1)
    spec = saved(of_family("mixtral"), tmp_path)
    spec = spec.model_copy(update={"base": spec.base.model_copy(update={"gradient_checkpointing": checkpointing})})
    lora = Lora(rank=4, dropout=0.0, target_modules="re:.*experts.*")
    measured, predicted = step_bytes(spec, lora, 1, batch, 32)
    assert predicted == pytest.approx(measured, rel=0.06)
    two_trials = step_bytes(spec, lora, 2, batch, 32)  # which are trained one by one
    assert two_trials == (pytest.approx(measured, rel=0.01), predicted)


@pytest.mark.parametrize("family", ["llama4", "phimoe", "granite", "deepseek", "lfm2", "seed_oss", "deepseek_v4"])
@pytest.mark.parametrize("target", ["attention", "all-linear"])
def test_replay_holds_what_the_engine_holds_of_mixtures_and_states(tmp_path: Path, family: str, target: str) -> None:
    """Routers that are linear layers in name alone, layers with a state, values narrower than keys, drawn attention."""
    torch.set_num_threads(1)
    spec = saved(of_family(family), tmp_path)
    measured, predicted = step_bytes(spec, Lora(rank=8, dropout=0.0, target_modules=target), 1, 4, 64)
    assert predicted == pytest.approx(measured, rel=0.08)
    for setup in (CPU, GPU):
        memory = on_shapes(of_family(family), setup)
        memory.host([TrialShape(resolve(memory.tree, target), 4, False, 2, 32)])
        assert not memory.by_rule


@pytest.mark.parametrize("family", ["bloom", "jamba"])
def test_replay_holds_what_the_engine_holds_of_a_family(tmp_path: Path, family: str) -> None:
    torch.set_num_threads(1)
    spec = saved(of_family(family), tmp_path)
    measured, predicted = step_bytes(spec, Lora(rank=8, dropout=0.0, target_modules="attention"), 1, 4, 32)
    assert predicted == pytest.approx(measured, rel=0.06)
    if family == "bloom":  # trials that cannot share a pass are trained one by one
        measured, predicted = step_bytes(spec, Lora(rank=8, dropout=0.0, target_modules="attention"), 3, 4, 32)
        assert predicted == pytest.approx(measured, rel=0.06)
    for setup in (CPU, GPU, replace(GPU, checkpointing=True)):
        memory = on_shapes(of_family(family), setup)
        memory.host([TrialShape(resolve(memory.tree, "attention"), 4, False, 2, 32)])
        assert not memory.by_rule


@pytest.mark.parametrize(
    ("family", "shared", "in_turn"),
    [
        ("llama", True, False),
        ("bloom", False, False),
        ("jamba", False, False),
        ("lfm2", False, False),
        ("deepseek_v4", False, False),
        ("llama4", False, True),
        ("phimoe", False, True),
        ("a window in masks alone", False, False),
        ("turned by the longest row", False, True),
        ("opt", False, True),
    ],
)
def test_planner_has_trials_in_passes_as_the_engine_has(
    tmp_path: Path, family: str, shared: bool, in_turn: bool
) -> None:
    torch.set_num_threads(1)
    config = of_family(family)
    lora = Lora(rank=4, dropout=0.0, target_modules="attention")
    engine = engine_with(saved(config, tmp_path), 1, lora, 1, 32)
    engine.step(["0"])
    assert (engine._packed.flat, engine._lanes.in_turn) == (shared, in_turn)
    for setup in (CPU, GPU):
        passes = on_shapes(config, setup)._replay.passes(32)
        assert (passes.shared, passes.in_turn) == (shared, in_turn)
    if family in ("a window in masks alone", "turned by the longest row"):
        assert on_shapes(config, CPU)._replay.passes(16).shared


def test_trials_that_are_trained_one_by_one_take_the_largest_ones_work() -> None:
    """Each lane has one, where no expert is adapted: PEFT's active adapters are the same for all threads."""
    bloom, jamba = (on_shapes(of_family(family), CPU) for family in ("bloom", "jamba"))
    small, large = (
        TrialShape(resolve(bloom.tree, "attention"), rank, False, batch, 32) for rank, batch in ((64, 1), (4, 8))
    )
    both, alone = bloom.host([small, large]), bloom.host([large])
    assert both.work == alone.work
    assert both.trials == bloom.trial(small).state + bloom.trial(large).state
    lanes = on_shapes(of_family("bloom"), replace(CPU, lanes=2))
    assert lanes.host([small, large, small]).activations > alone.activations
    assert lanes.host([small, large, small]).work == lanes.host([small, large, small, small]).work
    experts = TrialShape(resolve(jamba.tree, "re:.*experts.*"), 4, False, 2, 32)
    assert jamba.host([experts] * 3).work == jamba.host([experts]).work


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "bent"])
def test_logits_that_a_model_caps_or_scales_are_held_as_the_engine_holds_them(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine takes them in turns, Gemma-2's capped and Cohere's scaled ones too, unless they are bent otherwise."""
    if family == "bent":
        family = "gemma2"
        monkeypatch.setattr(torch, "tanh", torch.atan)  # as an architecture that nobody knows yet
    torch.set_num_threads(1)
    spec = saved(of_family(family), tmp_path)
    lora = Lora(rank=8, dropout=0.0, target_modules="attention")
    measured, predicted = step_bytes(spec, lora, 1, 4, 32)
    assert predicted == pytest.approx(measured, rel=0.04)
    engine = engine_with(spec, 1, lora, 4, 32)
    memory = on_shapes(of_family(family), replace(CPU, validation_tokens=16 * 32))
    assert memory._replay.in_turns == (engine._packed.bend is not None) == (torch.tanh is not torch.atan)
    model = engine.base.model
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        engine.untrained()
    shape = TrialShape(resolve(memory.tree, "attention"), 8, False, 4, 32)
    assert 0.98 * live.peak < memory.host([shape]).evaluation < 1.06 * live.peak


def unwilling(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("Tensor.item() cannot be called on meta tensors")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rule_of_thumb_knows_what_adapted_experts_take(monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    setup = replace(CPU, checkpointing=checkpointing)
    exact = on_shapes(of_family("mixtral"), setup)
    experts = resolve(exact.tree, "re:.*experts.*")
    shapes = [TrialShape(experts, 4, False, batch, 32) for batch in (1, 8)]
    found = [exact.trial(shape) for shape in shapes]
    monkeypatch.setattr(torch.nn.Embedding, "forward", unwilling)
    by_rule = on_shapes(of_family("mixtral"), setup)
    ruled = [by_rule.trial(shape) for shape in shapes]
    assert by_rule.by_rule
    too_small, too_large = RULE_WIDTH
    for rule, real in zip(ruled, found, strict=True):
        assert too_small < (real.activations + real.passing) / (rule.activations + rule.passing) < too_large
    weights = sum(4 * by_rule._replay._weight(name).numel() for name in experts.parameters)
    assert 8 * ruled[0].activations - ruled[1].activations == pytest.approx(0 if checkpointing else 7 * weights, abs=8)


def test_rule_of_thumb_is_as_wide_as_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that run on shapes, OPT keeps least and Mamba most."""
    few, many = (on_shapes(of_family(family), GPU) for family in ("opt", "mamba"))
    shapes = [
        TrialShape(resolve(few.tree, "mlp"), 4, False, 2, 32),
        TrialShape(resolve(many.tree, "all-linear"), 4, True, 2, 32),
    ]
    bytes_of = [memory.trial(shape) for memory, shape in zip((few, many), shapes, strict=True)]
    least, most = (found.activations + found.passing for found in bytes_of)
    assert not few.by_rule
    assert not many.by_rule

    monkeypatch.setattr(torch.nn.Embedding, "forward", unwilling)
    few, many = (on_shapes(of_family(family), GPU) for family in ("opt", "mamba"))
    bytes_of = [memory.trial(shape) for memory, shape in zip((few, many), shapes, strict=True)]
    too_much, too_little = (found.activations + found.passing for found in bytes_of)
    assert few.by_rule
    assert many.by_rule
    too_small, too_large = RULE_WIDTH
    assert too_small * too_much < least < too_much / 3
    assert 3 * too_little < most < too_large * too_little


def test_checkpointing_and_smaller_batches_take_less() -> None:
    model = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    kept = BaseMemory(built(**model), GPU)
    recomputed = BaseMemory(built(**model), replace(GPU, checkpointing=True))
    shape = TrialShape(resolve(kept.tree, "all-linear"), 8, False, 4, 128)
    assert recomputed.host([shape]).activations < kept.host([shape]).activations / 2
    assert kept.trial(replace(shape, batch_size=1)).activations == pytest.approx(kept.trial(shape).activations / 4)
    assert recomputed.together(shape, 4 << 30) > kept.together(shape, 4 << 30) > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_every_known_model_can_be_planned(name: str) -> None:
    for checkpointing in (False, True):
        memory = BaseMemory(skeleton(str(shared("configs") / name)), replace(GPU, checkpointing=checkpointing))
        shape = TrialShape(resolve(memory.tree, "attention"), 16, True, 1, 64)
        trial = memory.trial(shape)
        assert trial.state == 18 * trial.trainable
        assert memory.host([shape]).total > memory.weights.total + trial.state + trial.activations


# A real process

MEASURE = """
import sys, json, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_memory import engine_with
from lora_search.engine.metrics import peak_memory_bytes
from lora_search.spec import parse_spec
from lora_search.spec.schema import Lora
spec = parse_spec({spec!r}, source="sweep.yaml", folder={tests!r} and __import__("pathlib").Path({tests!r}))
engine = engine_with(spec, 4, Lora(rank=16, dropout=0.05, target_modules="all-linear"), 2, 128)
for _ in range(2):
    engine.step(engine.residents)
engine.report(engine.residents)
print(peak_memory_bytes([torch.device("cpu")]))
"""


def test_resident_size_is_not_that_of_the_process_that_started_this_one() -> None:
    code = "import torch; from lora_search.engine.metrics import peak_memory_bytes as peak\n"
    code += "print(peak([torch.device('cpu')]))"
    held = bytearray(1 << 30)
    held[:: 1 << 12] = bytes([1]) * (1 << 18)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(answer.stdout) < len(held)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_in_many_numbers_leave_no_kernels(dtype: str) -> None:
    """Where oneDNN made a kernel for each number, these came to 390 MB (a CPU with AVX-512)."""
    code = f"""import torch
from lora_search.engine.products import product
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
weight = torch.ones(192, 192, dtype=torch.{dtype})
exact = 2.0 ** (torch.arange(640.0)[:, None].expand(640, 192) % 8)  # no product has to be rounded
assert torch.equal(product(exact, weight), exact * 192)
before = resident()
for count in range(40, 640):
    assert torch.equal(product(exact[:count], weight), exact[:count] * 192)
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 64 << 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resident_size_of_a_process_is_predicted(dtype: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from lora_search.model import compute_dtype

    if dtype == "bfloat16" and compute_dtype("auto", torch.device("cpu")) is not torch.bfloat16:
        pytest.skip("this CPU multiplies no bfloat16")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(str(tmp_path / "model"))
    sweep = f"base: {{model: {tmp_path / 'model'}, compute_dtype: {dtype}}}\n"
    code = MEASURE.format(tests=str(Path(__file__).parent), spec=sweep)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    measured = int(answer.stdout.split()[-1])
    setup = replace(CPU, compute=dtype, validation_tokens=16 * 128)
    memory = BaseMemory(skeleton(str(tmp_path / "model")), setup)
    shape = TrialShape(resolve(memory.tree, "all-linear"), 16, True, 2, 128)
    predicted = memory.host([shape] * 4).total
    print(f"resident at most {measured / 1e6:.0f} MB, predicted {predicted / 1e6:.0f} MB")
    assert 0.95 * measured < predicted < 1.15 * measured


# Figures that others publish

TAUGHT = {  # GB: full fine-tuning in fp16 (weights and gradients), LoRA in fp16, QLoRA, QLoRA with batch 4
    "7B": (28, 16, 6, 12),
    "13B": (52, 30, 10, 20),
}


@pytest.mark.parametrize("size", list(TAUGHT))
def test_taught_figures_are_of_this_order(size: str) -> None:
    """Within 20 %, on these assumptions: rank 16 on attention, rows of 256 tokens, nothing recomputed, float32 for what
    NF4 leaves out. Each of them makes a difference: longer rows, and recomputing, move the last figure most."""

    def model() -> PreTrainedModel:
        return built() if size == "7B" else skeleton(str(shared("configs") / "llama-2-13b"))

    figures = familiar_figures(model)
    print(size, [f"{figure.short / 1e9:.1f}" for figure in figures])
    for figure, taught in zip(figures, TAUGHT[size], strict=True):
        assert figure.short / 1e9 == pytest.approx(taught, rel=0.2)
    batch = figures[-1]
    assert batch.long > 1.4 * batch.short
    assert batch.recomputed < 0.7 * batch.long


@pytest.mark.parametrize("run", RUNS)
def test_published_runs_of_peft_are_explained(run: str) -> None:
    """Plain PEFT on Llama-3.2-3B in bfloat16: memory is what 4 rows of 768 tokens take, their most by the run's own
    limit, float32 logits of all positions with it; evaluation and generation stay below that. `mem allocated avg` is
    taken between steps, when base, trial and the last batch's logits are there."""
    published = json.loads((shared("peft-method-comparison") / run).read_text())
    limits, lora = published["run_info"]["train_config"], published["run_info"]["peft_config"]
    facts = published["train_info"]

    def step(length: int) -> Any:
        model = skeleton(str(shared("configs") / "llama-3.2-3b"))
        return plain_step(model, lora["target_modules"], lora["r"], limits["batch_size"], length, torch.bfloat16)

    most = step(limits["max_seq_length"])
    print(f"{run}: {most.peak / 1e9:.2f} GB, published {facts['accelerator_memory_max'] / 1e9:.2f}")
    assert most.trainable == facts["num_trainable_params"]
    assert 0.95 < most.peak / facts["accelerator_memory_max"] < 1.15
    allocated = [metrics["mem allocated avg"] for metrics in facts["metrics"] if "mem allocated avg" in metrics]
    between = most.weights + most.state + most.logits / limits["max_seq_length"] * 340  # mean padded length, fitted
    assert between == pytest.approx(sum(allocated) / len(allocated), rel=0.01)


# The space


def test_corners_are_the_extremes_of_what_takes_memory(tiny_spec: SweepSpec) -> None:
    memory = BaseMemory(skeleton(tiny_spec.base.model), CPU)
    found = corners(tiny_spec, memory.tree, 32)
    described = [(c.target, c.size, c.shape.rank, c.shape.dropout) for c in found]
    assert described == [
        ("attention-qv", "smallest", 2, False),
        ("attention-qv", "common", 8, True),
        ("all-linear", "smallest", 2, False),
        ("all-linear", "common", 8, True),
    ]
    assert {c.shape.batch_size for c in found} == {4}


def test_largest_trial_is_the_one_with_most_bytes(tiny: Path) -> None:
    """Adapters of the last layer alone have more parameters here, and keep next to nothing of the layers before."""
    upper = r"re:.*layers\.7\..*proj"
    spec = make_spec(tiny, search={"space": {"target_modules": {"choice": ["attention-qv", upper]}}, "enqueue": []})
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
    memory = BaseMemory(built(**sizes, vocab_size=100), replace(GPU, validation_tokens=100))
    found = corners(spec, memory.tree, 256)
    assert found[-1].target == upper
    assert memory.trial(found[-1].shape).trainable > memory.trial(found[0].shape).trainable
    assert largest(found, memory).target == "attention-qv"
    assert smallest(found, memory).target == upper
    apart = memory.host([found[0].shape, found[-1].shape] * 2).total  # in passes with both: more than of either alone
    assert apart > memory.host([largest(found, memory).shape] * 4).total
    whatever = Crowd.of(found, memory).total(4, memory)
    assert whatever >= apart
    assert Gauge(spec, memory, whatever, longest=256, most=16).together() == 4
    assert Gauge(spec, memory, whatever - 1, longest=256, most=16).together() == 3


@pytest.mark.parametrize(
    ("space", "training", "length", "key"),
    [
        ({"rank": {"choice": [8, 4096]}}, {}, 64, "search.space.rank: found 4096"),
        ({"rank": {"choice": [8, 16]}}, {"batch_size": 4000}, 64, "training.batch_size: found 4000"),
        ({"batch_size": {"choice": [1, 4000]}}, {}, 64, "search.space.batch_size: found 4000"),
        ({"rank": {"choice": [8, 16]}}, {"batch_size": 1}, 100_000, "data.max_length: found 100000"),
    ],
)
def test_what_can_never_fit_is_refused_by_name(
    tiny: Path, space: dict[str, Any], training: dict[str, Any], length: int, key: str
) -> None:
    search = {"space": {"target_modules": "all-linear", **space}, "enqueue": []}
    spec = make_spec(tiny, search=search, training=training, data={"max_length": length})
    memory = BaseMemory(skeleton(spec.base.model), replace(GPU, validation_tokens=100))
    found = corners(spec, memory.tree, length)
    with pytest.raises(InputError) as error:
        refuse_what_never_fits(spec, memory, found, 100_000_000, "a small GPU")
    message = str(error.value)
    assert message.startswith(key)
    assert "a small GPU has 0.1 GB to give" in message
    assert "at most" in message
    refuse_what_never_fits(spec, memory, found, 200_000_000_000, "a large GPU")


def test_base_that_never_fits_is_refused_by_name(tiny_spec: SweepSpec) -> None:
    memory = BaseMemory(skeleton(tiny_spec.base.model), GPU)
    found = corners(tiny_spec, memory.tree, 32)
    with pytest.raises(InputError, match=r"base\.model: .* alone takes"):
        refuse_what_never_fits(tiny_spec, memory, found, 1000, "a GPU")


def test_gpu_without_kernels_keeps_masks_and_copies(tiny_spec: SweepSpec) -> None:
    """A byte for every number that goes into an adapted layer, where something is dropped."""
    shape = TrialShape(resolve(BaseMemory(skeleton(tiny_spec.base.model), GPU).tree, "all-linear"), 8, True, 4, 32)
    with_kernels, without = (
        BaseMemory(skeleton(tiny_spec.base.model), replace(GPU, kernels=kernels)).trial(shape)
        for kernels in (True, False)
    )
    config = skeleton(tiny_spec.base.model).config
    read = config.num_hidden_layers * (3 * config.hidden_size + config.intermediate_size)
    assert without.activations - with_kernels.activations == shape.tokens * read
    assert without.state == with_kernels.state


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_a_gpu_is_predicted(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from lora_search.engine import Engine
    from lora_search.model import load_base
    from lora_search.spec import Base

    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, num_attention_heads=16)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(str(tmp_path / "model"))
    base = load_base(Base(model=str(tmp_path / "model")), "cuda")
    engine = Engine(base, rows_of(256, 32_000))
    for trial in range(4):
        engine.admit(str(trial), TrialConfig(Lora(rank=16, target_modules="all-linear"), Training(batch_size=4)))
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        engine.step(engine.residents)
    engine.report(engine.residents)
    measured = torch.cuda.max_memory_allocated()
    name = str(base.compute_dtype).removeprefix("torch.")
    memory = BaseMemory(skeleton(str(tmp_path / "model")), Setup("cuda", name, validation_tokens=16 * 256))
    shape = TrialShape(resolve(memory.tree, "all-linear"), 16, True, 4, 256)
    predicted = memory.host([shape] * 4).total
    print(f"allocated at most {measured / 1e9:.2f} GB, predicted {predicted / 1e9:.2f} GB")
    assert 0.95 * measured < predicted < 1.15 * measured


def test_gauge_admits_by_bytes_and_learns_from_what_it_sees(tiny_spec: SweepSpec) -> None:
    from lora_search.memory.gauge import HOPE
    from lora_search.space import trial_config

    memory = BaseMemory(skeleton(tiny_spec.base.model), CPU)
    small = trial_config(tiny_spec, {"rank": 2, "target_modules": "attention-qv"})
    large = trial_config(tiny_spec, {"rank": 8, "target_modules": "all-linear"})
    largest = corners(tiny_spec, memory.tree, 32)[-1].shape
    capacity = memory.host([largest] * 3).total
    gauge = Gauge(tiny_spec, memory, capacity, longest=32, most=8)
    assert gauge.room([large] * 3) >= 0 > gauge.room([large] * 6)
    assert 3 <= gauge.together() < 6
    found = corners(tiny_spec, memory.tree, 32)
    for shape, count in ((found[0].shape, 5), (found[0].shape, 6), (largest, 8)):
        tight = int(HOPE * memory.host([shape] * count).total) + 1  # as little as so many might take
        assert Gauge(tiny_spec, memory, tight, longest=32, most=8).ever() == count
    assert Gauge(tiny_spec, memory, 1, longest=32, most=8).ever() == 1
    assert gauge.room([small] * 4) > gauge.room([large] * 4)
    assert gauge.size(large) > gauge.size(small) > 0
    assert gauge.trial_bytes(large) == memory.trial(largest).total > gauge.trial_bytes(small)
    assert Gauge(tiny_spec, memory, capacity, longest=32, most=3).size(large) == 0  # bytes will never matter
    gauge.saw([large] * 2, int(1.5 * memory.host([largest] * 2).total))
    assert gauge.correction == pytest.approx(1.5, rel=0.05)
    assert gauge.room([large] * 3) < 0
    assert 1 <= gauge.together() < 3
    gauge.saw([large], int(1.5 * memory.host([largest] * 2).total))  # a peak never falls, nor does what explains it
    assert gauge.correction == pytest.approx(1.5, rel=0.05)


def test_gauge_explains_a_peak_by_the_passes_that_there_were(tiny_spec: SweepSpec) -> None:
    """A trial that is resident and in no pass keeps no activations: what was measured is not put down to it."""
    from lora_search.space import trial_config

    memory = BaseMemory(skeleton(tiny_spec.base.model), replace(CPU, validation_tokens=256))
    large = trial_config(tiny_spec, {"rank": 8, "target_modules": "all-linear"})
    largest = corners(tiny_spec, memory.tree, 32)[-1].shape
    truth = memory.host([largest] * 4, [largest] * 2).total
    assert memory.host([largest] * 2).total < truth < memory.host([largest] * 4).total
    gauge = Gauge(tiny_spec, memory, memory.host([largest] * 4).total, longest=32, most=8)
    gauge.saw([large] * 4, int(1.2 * truth), [large] * 2)
    assert gauge.correction == pytest.approx(1.2, rel=0.01)
