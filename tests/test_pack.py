"""The pack: a trial's gradients, losses and adapter are what they would be alone, in whatever company."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import make_spec
from gguf_models import DEEPSEEK_V4, MODELS, Small, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from torch import nn
from torch.nn.functional import cross_entropy

from lora_search.best.conclude import loss_interval
from lora_search.checkpoint import ADAPTER_WEIGHTS
from lora_search.data import FlatRows, TokenSplit, flatten, tokenize_data
from lora_search.engine import Engine, Evaluation, StepMetrics, evaluate
from lora_search.engine import finish as finish_module
from lora_search.engine import forward as forward_module
from lora_search.engine import fused as fused_module
from lora_search.engine import gated as gated_module
from lora_search.engine import products as products_module
from lora_search.engine.adamw import step_together
from lora_search.engine.attention import PackedAttention
from lora_search.engine.layers import DropoutSite, LinearSite
from lora_search.engine.masks import Masks
from lora_search.engine.pack import Share, build_pack, build_padded, run
from lora_search.engine.sites import attach_sites
from lora_search.engine.source import source_of
from lora_search.engine.table import tables
from lora_search.errors import OUT_OF_MEMORY, HostFailed, InputError, TrialFailed
from lora_search.model import load_base, load_tokenizer
from lora_search.space import TrialConfig, trial_config
from lora_search.targets import module_tree

if TYPE_CHECKING:
    from pathlib import Path

    from lora_search.data import TokenizedData
    from lora_search.engine.pack import Pack
    from lora_search.spec import SweepSpec

STEPS = 20


@dataclass(frozen=True)
class Stay:
    """A trial and the steps of the pack between which it is there."""

    config: TrialConfig
    joins: int
    leaves: int


@pytest.fixture(scope="module")
def spec(tiny: Path) -> SweepSpec:
    return make_spec(tiny)


@pytest.fixture(autouse=True)
def _one_thread_a_pass(_two_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=[1, 2], ids=["one-lane", "two-lanes"])
def engine(spec: SweepSpec, tiny_data: TokenizedData, request: pytest.FixtureRequest) -> Engine:
    """One engine for every example: that nothing of a pack is left for the next is part of the promise."""
    return Engine(load_base(spec.base, "cpu"), tiny_data, lanes=request.param)


@pytest.fixture(scope="module")
def one_lane(spec: SweepSpec, tiny_data: TokenizedData) -> Engine:
    """As on a GPU."""
    return Engine(load_base(spec.base, "cpu"), tiny_data)


sampled = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 16),
        "alpha": st.floats(1.0, 64.0),
        "dropout": st.sampled_from([0.0, 0.05, 0.3]),
        "target_modules": st.sampled_from(["attention-qv", "attention", "mlp", "all-linear", "re:.*1.*up_proj"]),
        "use_rslora": st.booleans(),
        "learning_rate": st.floats(1e-4, 1e-2),
        "lr_schedule": st.sampled_from(["cosine", "linear", "constant", "inverse_sqrt"]),
        "warmup_ratio": st.sampled_from([0.0, 0.1, 0.5]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "max_grad_norm": st.sampled_from([0.0, 0.1, 1.0]),
        "batch_size": st.integers(1, 5),
        "gradient_accumulation_steps": st.integers(1, 3),
        "adam_beta2": st.sampled_from([0.95, 0.999]),
        "steps": st.integers(STEPS, 3 * STEPS),
        "seed": st.integers(0, 5),
    }
)


@st.composite
def stays(draw: st.DrawFn) -> tuple[dict[str, Any], int, int]:
    joins = draw(st.integers(0, STEPS // 2))
    return draw(sampled), joins, draw(st.integers(joins + 1, STEPS))


packs = st.lists(stays(), min_size=1, max_size=8)

property_settings = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def as_stays(spec: SweepSpec, drawn: Sequence[tuple[dict[str, Any], int, int]]) -> list[Stay]:
    return [Stay(trial_config(spec, values), joins, leaves) for values, joins, leaves in drawn]


def losses_of(outcomes: dict[str, Any]) -> dict[str, float]:
    assert all(isinstance(outcome, StepMetrics) for outcome in outcomes.values()), outcomes
    return {name: outcome.loss for name, outcome in outcomes.items()}


def run_pack(engine: Engine, guests: Sequence[Stay]) -> Iterator[tuple[list[float], torch.Tensor]]:
    """Each trial's losses and its adapter when it left, all in one pack, trials coming and going."""
    losses: list[list[float]] = [[] for _ in guests]
    adapters: list[torch.Tensor] = [torch.empty(0)] * len(guests)
    for step in range(STEPS):
        for index, guest in enumerate(guests):
            if guest.joins == step:
                engine.admit(str(index), guest.config)
        for name, loss in losses_of(engine.step(engine.residents)).items() if engine.residents else ():
            losses[int(name)].append(loss)
        for index, guest in enumerate(guests):
            if guest.leaves == step + 1:
                adapters[index] = adapter_of(engine, str(index))
                engine.release(str(index))
    assert engine.residents == ()
    return zip(losses, adapters, strict=True)


def adapter_of(engine: Engine, trial: str) -> torch.Tensor:
    tensors = load_tensors(engine.snapshot(trial)[ADAPTER_WEIGHTS])
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def alone(guest: Stay) -> Stay:
    return Stay(guest.config, 0, guest.leaves - guest.joins)


def require_as_alone(engine: Engine, guests: Sequence[Stay], found: Iterator[tuple[list[float], torch.Tensor]]) -> None:
    for guest, (losses, adapter) in zip(guests, found, strict=True):
        ((solo_losses, solo_adapter),) = run_pack(engine, [alone(guest)])
        assert losses == solo_losses
        assert torch.equal(adapter, solo_adapter)


def under_way(engine: Engine, guests: Sequence[Stay]) -> list[str]:
    """Trials that have made some steps together, so that B is no longer zero and A has a gradient; their names."""
    names = [str(index) for index in range(len(guests))]
    for name, guest in zip(names, guests, strict=True):
        engine.admit(name, guest.config)
    for _ in range(3):
        losses_of(engine.step(names))
    return names


@property_settings
@given(drawn=packs)
def test_trial_is_trained_as_if_alone(
    engine: Engine, spec: SweepSpec, drawn: Sequence[tuple[dict[str, Any], int, int]]
) -> None:
    guests = as_stays(spec, drawn)
    require_as_alone(engine, guests, run_pack(engine, guests))


@property_settings
@given(drawn=packs, seed=st.integers(0, 99))
def test_gradient_is_the_same_alone_and_in_company(
    engine: Engine, spec: SweepSpec, drawn: Sequence[tuple[dict[str, Any], int, int]], seed: int
) -> None:
    """From the same state."""
    names = under_way(engine, as_stays(spec, drawn))
    together = engine.gradients(names)
    for name in names:
        solo = engine.gradients([name])[name]
        assert solo.norm() > 0
        assert torch.equal(together[name], solo)
        engine.release(name)


OTHERS = {"gpt2": MODELS["gpt2"], "gemma2": MODELS["gemma2"], "a short window": Small("mistral", {"sliding_window": 8})}


@pytest.mark.parametrize("small", OTHERS.values(), ids=OTHERS)
def test_trial_on_another_architecture_is_trained_as_if_alone(
    tiny: Path, tmp_path: Path, tiny_data: TokenizedData, small: Small
) -> None:
    """Dropouts of the base's own, weights that stand transposed; capped logits, windows of attention."""
    spec = make_spec(tiny, base={"model": str(write_model(small, tmp_path / "model"))})
    engine = Engine(load_base(spec.base, "cpu"), tiny_data)
    values = {"rank": 4, "learning_rate": 5e-3, "dropout": 0.1, "target_modules": "all-linear", "steps": STEPS}
    guests = [
        Stay(trial_config(spec, values | {"seed": seed, "batch_size": 1 + seed}), joins=seed, leaves=STEPS - 2 * seed)
        for seed in range(3)
    ]
    assert engine._packed.flat
    for guest, (losses, adapter) in zip(guests, run_pack(engine, guests), strict=True):
        ((solo_losses, solo_adapter),) = run_pack(engine, [alone(guest)])
        assert losses == pytest.approx(solo_losses, rel=1e-5)  # GPT-2 and Gemma 2 differ in the last bit
        assert (adapter - solo_adapter).norm() <= 1e-3 * solo_adapter.norm()


QWEN2_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "use_sliding_window": True,
    "max_window_layers": 2,
}


@pytest.mark.parametrize("window", [13, 512])
def test_window_that_a_base_has_in_its_masks_alone_is_kept(
    tiny: Path, tmp_path: Path, tiny_data: TokenizedData, window: int
) -> None:
    """Flat sequences have no masks, and the probe's rows are shorter than the window."""
    folder = write_model(Small("qwen2_moe", QWEN2_MOE | {"sliding_window": window}), tmp_path / "model")
    base = load_base(make_spec(tiny, base={"model": str(folder), "quantization": "none"}).base, "cpu")
    engine = Engine(base, tiny_data)
    assert engine._packed.flat == (window == 512)
    assert 13 < max(tiny_data.validation.lengths_N) < 512
    require_models_own_loss(engine)


def require_models_own_loss(engine: Engine) -> None:
    """As its own code says of one row after the other."""
    measured, split = engine.untrained(), engine.data.validation
    loss = 0.0
    for row in range(len(split)):
        flat = flatten(split, [row])
        with torch.no_grad():
            logits = engine.base.model(input_ids=torch.from_numpy(flat.tokens_N)[None]).logits[0, flat.predictors_M]
        loss += cross_entropy(logits, torch.from_numpy(flat.targets_M), reduction="sum").item()
    assert measured.loss == pytest.approx(loss / measured.targets, rel=1e-6)


@pytest.mark.parametrize("family", ["nanochat", "llama", "qwen3"])
def test_base_says_in_a_pack_what_its_own_code_says(
    tiny: Path, tmp_path: Path, tiny_data: TokenizedData, family: str
) -> None:
    """NanoChat turns its halves the other way round, by code of which the rest is Llama's."""
    folder = write_model(MODELS.get(family, Small(family)), tmp_path / "model")
    base = load_base(make_spec(tiny, base={"model": str(folder), "quantization": "none"}).base, "cpu")
    engine = Engine(base, tiny_data)
    assert engine._packed.flat
    require_models_own_loss(engine)


def test_draws_that_seldom_decide_anything_are_found(tiny: Path, tmp_path: Path, tiny_data: TokenizedData) -> None:
    """PhiMoE's router draws as it trains; which experts it picks is another one's choice but now and then."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 1e-9}
    folder = write_model(Small("phimoe", experts), tmp_path / "model")
    base = load_base(make_spec(tiny, base={"model": str(folder), "quantization": "none"}).base, "cpu")
    engine = Engine(base, tiny_data)
    assert (engine._packed.flat, engine._packed.draws) == (False, True)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_longer_rows_of_others_do_not_turn_a_trials_positions(
    tiny: Path, tmp_path: Path, tiny_data: TokenizedData, kind: str
) -> None:
    """Of a base that turns all positions of a pass by the longest row in it, as Phi-4-mini does beyond 4,096 tokens."""
    folder = shutil.copytree(tiny / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    lengths = tiny_data.train.lengths_N
    rope = {
        "rope_type": kind,
        "rope_theta": 1e4,
        "original_max_position_embeddings": int(np.median(lengths)),
        "factor": 4.0,
    }
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    else:  # and so does it when it is to turn them anew
        config["max_position_embeddings"] = int(np.median(lengths))
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    spec = make_spec(tiny, base={"model": str(folder)})
    engine = Engine(load_base(spec.base, "cpu"), tiny_data)
    values = {"rank": 4, "learning_rate": 5e-3, "batch_size": 1, "steps": STEPS}
    guests = [Stay(trial_config(spec, values | {"seed": seed}), 0, STEPS) for seed in range(3)]
    require_as_alone(engine, guests, run_pack(engine, guests))
    assert not engine._packed.flat


def test_keys_of_several_tokens_are_of_one_trial(tiny: Path, tmp_path: Path, tiny_data: TokenizedData) -> None:
    """DeepSeek V4's attention has one for some neighbours, which flat sequences would be to each other."""
    rates = {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}
    folder = write_model(Small("deepseek_v4", DEEPSEEK_V4 | {"compress_rates": rates}), tmp_path / "model")
    spec = make_spec(tiny, base={"model": str(folder)})
    engine = Engine(load_base(spec.base, "cpu"), tiny_data)
    values = {"rank": 4, "learning_rate": 5e-3, "batch_size": 2, "steps": STEPS, "target_modules": "attention"}
    guests = [Stay(trial_config(spec, values | {"seed": seed}), joins=seed, leaves=STEPS - seed) for seed in range(2)]
    require_as_alone(engine, guests, run_pack(engine, guests))


@pytest.mark.parametrize("lanes", [1, 2])
def test_what_a_base_draws_by_itself_is_each_trials_own(
    tiny: Path, tmp_path: Path, tiny_data: TokenizedData, lanes: int
) -> None:
    """OPT's dropout is no module, but a call in its code."""
    sizes = {"word_embed_proj_dim": 64, "ffn_dim": 64, "dropout": 0.3, "do_layer_norm_before": True}
    spec = make_spec(tiny, base={"model": str(write_model(Small("opt", sizes), tmp_path / "model"))})
    engine = Engine(load_base(spec.base, "cpu"), tiny_data, lanes=lanes)
    values = {"rank": 4, "learning_rate": 5e-3, "batch_size": 2, "steps": STEPS, "target_modules": "attention"}
    guests = [Stay(trial_config(spec, values | {"seed": seed}), joins=seed, leaves=STEPS - seed) for seed in range(3)]
    found = list(run_pack(engine, guests))
    assert found[0][0][0] != found[1][0][0]
    require_as_alone(engine, guests, iter(found))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2"])
def test_norm_of_a_pack_is_the_models_own_with_its_gradient(tiny: Path, tmp_path: Path, family: str) -> None:
    """Gemma's is another one, and stays."""
    folder = write_model(MODELS[family], tmp_path / "model")
    sizes = {"model": str(folder), "quantization": "none", "compute_dtype": "float32"}
    base = load_base(make_spec(tiny, base=sizes).base, "cpu")
    norms = [module for module in base.model.modules() if "RMSNorm" in type(module).__name__]
    attach_sites(base, module_tree(base.model))
    assert ["forward" in vars(norm) for norm in norms] == [family != "gemma2"] * len(norms)
    rows = FlatRows(np.arange(5), np.arange(5), (5,), np.array([0]), np.array([1]))
    pack = build_pack([Share(rows, None)], torch.device("cpu"))
    for norm in norms:
        x = torch.randn(1, 5, len(norm.weight), requires_grad=True)
        grad = torch.randn_like(x)
        own = norm(x)
        own.backward(grad)
        assert x.grad is not None
        wanted, x.grad = x.grad, None
        with run(pack):
            ours = norm(x)
        assert torch.equal(ours, own)
        ours.backward(grad)
        torch.testing.assert_close(x.grad, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("small", "base"),
    [
        (MODELS["llama"], {"quantization": "nf4", "compute_dtype": "bfloat16"}),
        (Small("llama", {"mlp_bias": True}), {"quantization": "none", "compute_dtype": "float32"}),
        (MODELS["gemma2"], {"quantization": "none", "compute_dtype": "float32"}),
    ],
    ids=["bfloat16", "bias", "gelu"],
)
def test_gated_mlp_of_an_evaluation_is_the_models_own(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Small, base: dict[str, str]
) -> None:
    spec = make_spec(tiny, base=base | {"model": str(write_model(small, tmp_path / "model"))})
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    monkeypatch.setattr(products_module, "PIECE_BYTES", 1)
    engine = Engine(load_base(spec.base, "cpu"), data)
    for name, targets in enumerate(("mlp", "attention-qv", "re:.*up_proj", "re:.*1.*down_proj")):
        engine.admit(str(name), trial_config(spec, {"target_modules": targets, "rank": 4, "learning_rate": 1e-2}))
    for _ in range(3):
        losses_of(engine.step(engine.residents))
    pieces = Mock(wraps=gated_module.pieces)
    monkeypatch.setattr(gated_module, "pieces", pieces)
    ours = [engine.untrained(), *engine.evaluate(engine.residents).values()]
    assert pieces.call_count == 2 * len(ours)  # in each of two layers
    for module in engine.base.model.modules():
        if hasattr(module, "gate_proj"):
            del module.forward
    own = [engine._measure.split([None], "validation", False)[0], *engine.evaluate(engine.residents).values()]
    assert len({evaluation.loss for evaluation in own}) == len(own)
    assert [evaluation.loss for evaluation in ours] == pytest.approx([evaluation.loss for evaluation in own], rel=1e-6)


def test_rotation_of_a_pack_is_the_models_own_with_its_gradient(tiny: Path) -> None:
    base = load_base(make_spec(tiny).base, "cpu")
    rotates = sys.modules[type(base.model).__module__].apply_rotary_pos_emb
    attach_sites(base, module_tree(base.model))
    ours = sys.modules[type(base.model).__module__].apply_rotary_pos_emb
    attach_sites(base, module_tree(base.model))
    assert sys.modules[type(base.model).__module__].apply_rotary_pos_emb is ours  # once, however many bases there are
    rows = FlatRows(np.arange(5), np.arange(5), (5,), np.array([0]), np.array([1]))
    angles = torch.rand(1, 5, 4)
    tables = [torch.cat([turn(angles), turn(angles)], -1) for turn in (torch.cos, torch.sin)]
    found = []
    for rotate, packed in ((rotates, False), (ours, False), (ours, True)):
        torch.manual_seed(0)
        q, k = (torch.randn(1, heads, 5, 8, requires_grad=True) for heads in (4, 2))
        grads = torch.randn_like(q), torch.randn_like(k)
        with run(build_pack([Share(rows, None)], torch.device("cpu"))) if packed else nullcontext():
            out = rotate(q, k, *tables)
        torch.autograd.backward(out, grads)
        found.append((*out, q.grad, k.grad))
    own, elsewhere, in_a_pack = found
    torch.testing.assert_close(in_a_pack, own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(elsewhere, own, rtol=0, atol=0)


def test_rotation_that_is_no_function_is_left_to_the_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where kernels of the hub have taken its place."""
    base = load_base(make_spec(tiny).base, "cpu")
    another = nn.Identity()
    monkeypatch.setattr(sys.modules[type(base.model).__module__], "apply_rotary_pos_emb", another)
    attach_sites(base, module_tree(base.model))
    assert sys.modules[type(base.model).__module__].apply_rotary_pos_emb is another
    assert source_of(another) is None


def test_dropout_of_attention_reaches_every_head_where_rows_are_padded() -> None:
    """Its weights have a row for each head and token."""
    rows = FlatRows(np.arange(5), np.arange(5), (5,), np.array([0]), np.array([1]))
    pack = build_padded(Share(rows, None, Masks(0, 0, 0, 0.0)), 0, torch.device("cpu"))
    dropout = nn.Dropout(0.5)
    DropoutSite(7, dropout).attach()
    with run(pack):
        dropped = dropout(torch.ones(1, 8, 5, 5))
    assert (dropped == 0).flatten(2).any(-1).all()
    assert (dropped != 0).flatten(2).any(-1).all()


def test_experts_are_evaluated_in_turn_though_there_are_lanes(tiny: Path, tmp_path: Path) -> None:
    """PEFT puts the adapted weights of experts in place of the base's, for all threads."""
    folder = write_model(Small("mixtral", {"num_local_experts": 4}), tmp_path / "model")
    spec = make_spec(tiny, base={"model": str(folder), "quantization": "none"})
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    values = {"rank": 4, "dropout": 0.0, "target_modules": "re:.*experts.*", "learning_rate": 1e-2}
    found = []
    for lanes in (1, 2):
        engine = Engine(load_base(spec.base, "cpu"), data, lanes=lanes)
        engine._measure.tokens = 64
        engine.admit("0", trial_config(spec, values))
        for _ in range(3):
            losses_of(engine.step(["0"]))
        found.append([engine.evaluate(["0"])["0"].loss for _ in range(3)])
        assert engine.untrained().loss != found[-1][0]
    assert found[0] == found[1]


@pytest.mark.parametrize("target", ["attention", "re:.*experts.*"])
def test_trial_of_a_mixture_comes_back_though_the_first_one_has_left(
    tiny: Path, tmp_path: Path, tiny_data: TokenizedData, target: str
) -> None:
    """PEFT reads a mixture's checkpoint by the configuration of the adapter that it was made with."""
    folder = write_model(Small("mixtral", {"num_local_experts": 4}), tmp_path / "model")
    spec = make_spec(tiny, base={"model": str(folder), "quantization": "none"})
    engine = Engine(load_base(spec.base, "cpu"), tiny_data)
    values = {"rank": 4, "dropout": 0.0, "target_modules": target, "learning_rate": 1e-2, "batch_size": 2}
    for name in ("first", "0", "last"):
        engine.admit(name, trial_config(spec, values))
    engine.release("first")
    engine.release("last")
    for _ in range(2):
        losses_of(engine.step(["0"]))
    kept = engine.snapshot("0")
    wanted = losses_of(engine.step(["0"]))["0"]
    engine.release("0")
    engine.admit("0", trial_config(spec, values), kept)
    assert losses_of(engine.step(["0"]))["0"] == wanted


@property_settings
@given(drawn=packs, data=st.data())
def test_order_in_the_pack_changes_no_bit(
    engine: Engine, spec: SweepSpec, drawn: Sequence[tuple[dict[str, Any], int, int]], data: st.DataObject
) -> None:
    configs = [guest.config for guest in as_stays(spec, drawn)]
    order = data.draw(st.permutations(range(len(configs))))
    assert five_losses(engine, configs, order) == five_losses(engine, configs, range(len(configs)))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_nothing_goes_back_below_the_lowest_adapted_layer(
    tiny: Path, tiny_data: TokenizedData, monkeypatch: pytest.MonkeyPatch, quantization: str, checkpointing: bool
) -> None:
    spec = make_spec(tiny, base={"quantization": quantization, "gradient_checkpointing": checkpointing})
    base = load_base(spec.base, "cpu")
    engine = Engine(base, tiny_data)
    for rank in (4, 8):
        engine.admit(str(rank), trial_config(spec, {"rank": rank, "target_modules": r"re:.*layers\.1\..*"}))
    names = {module: name for name, module in base.model.named_modules()}
    products: Counter[str] = Counter()
    weight = LinearSite.weight_OI

    def counted(site: LinearSite) -> torch.Tensor:
        products[names[site._module].replace(".base_layer", "")] += 1
        return weight(site)

    monkeypatch.setattr(LinearSite, "weight_OI", counted)
    losses_of(engine.step(engine.residents))
    again = int(checkpointing)
    for name, count in products.items():
        below = ".layers.0." in name
        entrance = name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")
        assert count == (1 if below else 1 + again + (not entrance)), name
    assert len(products) == 14


@property_settings
@given(drawn=packs)
def test_trial_that_joins_behind_changes_no_bit(
    engine: Engine, spec: SweepSpec, drawn: Sequence[tuple[dict[str, Any], int, int]]
) -> None:
    configs = [guest.config for guest in as_stays(spec, drawn)]
    everybody = five_losses(engine, configs, range(len(configs)))
    assert five_losses(engine, configs[:1], [0]) == everybody[:1]


def five_losses(engine: Engine, configs: Sequence[TrialConfig], order: Sequence[int]) -> list[list[float]]:
    """Five steps' losses of each configuration, the trials standing in a given order in the pack."""
    names = [str(index) for index in order]
    for name in names:
        engine.admit(name, configs[int(name)])
    steps = [losses_of(engine.step(names)) for _ in range(5)]
    for name in names:
        engine.release(name)
    return [[step[str(index)] for step in steps] for index in range(len(configs))]


def test_logits_of_one_turn_are_there_at_once(
    one_lane: Engine, spec: SweepSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU they are half a gigabyte; what the planner says of its memory counts on it."""
    packed = one_lane._packed
    made: list[weakref.ref[torch.UntypedStorage]] = []
    multiplied = forward_module.multiplied

    def noted(*args: torch.Tensor) -> torch.Tensor:
        assert all(storage() is None for storage in made)
        product = multiplied(*args)
        made.append(weakref.ref(product.untyped_storage()))
        return product

    monkeypatch.setattr(forward_module, "multiplied", noted)
    monkeypatch.setattr(forward_module, "LOGIT_BYTES", {"cpu": 16 * packed._head.weight.shape[0]})
    one_lane.admit("0", trial_config(spec, {"batch_size": 2}))
    losses_of(one_lane.step(["0"]))
    steps = len(made)
    one_lane.evaluate(["0"])
    one_lane.release("0")
    assert len(made) > steps > 1


def test_gpu_without_a_compiler_for_kernels_trains_without_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused_module, "find_spec", lambda name: object())
    fuses = partial(fused_module.fuses.__wrapped__, torch.device("cuda", 7), torch.bfloat16)

    def runs(answer: bool | Exception) -> None:
        def probe(device: torch.device, dtype: torch.dtype) -> bool:
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(fused_module, "probe", probe)

    runs(True)
    assert fuses()
    assert not caplog.text
    runs(False)
    assert not fuses()
    assert "Triton compiles no kernels on cuda:7 (they compute something else)" in caplog.text
    runs(OSError("no gcc\nanywhere"))
    assert not fuses()
    assert "Triton compiles no kernels on cuda:7 (OSError: no gcc)" in caplog.text
    for error in ("CUDA error: device-side assert triggered", "Triton Error [CUDA]: an illegal memory access"):
        runs(RuntimeError(error))
        with pytest.raises(HostFailed):
            fuses()
    runs(RuntimeError("Triton Error [CUDA]: out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        fuses()


def test_kernels_are_told_where_every_matrix_is(one_lane: Engine, spec: SweepSpec) -> None:
    values = [
        {"rank": 3, "target_modules": "attention-qv", "dropout": 0.3},
        {"rank": 8, "target_modules": "all-linear", "dropout": 0.0},
        {"rank": 5, "target_modules": "mlp", "dropout": 0.0},
    ]
    for index, of_trial in enumerate(values):
        one_lane.admit(str(index), trial_config(spec, of_trial))
    trials = [one_lane._trials[name] for name in one_lane.residents]
    shares = [trial.next_shares(one_lane.data.train)[0] for trial in trials]
    shares.append(replace(shares[0], adapter=None, masks=None))  # the untrained base
    pack = build_pack(shares, torch.device("cpu"))
    found = tables(pack, torch.device("cpu"))
    assert sorted(place for places in found for place in places) == sorted(one_lane._places.values())
    for places, table in found.items():
        downs = [trial.adapter.down(places) for trial in trials]
        assert table.ranks(0) == max((len(down.a_SI) for down in downs if down is not None), default=0)
        assert table.drops
        for part, down, trial, row in zip(pack.parts, downs, trials, table.on_device[:, table.at :], strict=False):
            assert row[:2].tolist() == [part.tokens.start, part.tokens.stop]
            assert row[4].to(torch.int32).view(torch.float32) == pytest.approx(part.share.scale)
            records = row[5:].view(-1)[: 4 * (1 + len(places))].view(-1, 4).tolist()
            if down is None:
                assert not any(map(any, records))
                continue
            assert records[0] == [down.a_SI.data_ptr(), down.grad_a_SI.data_ptr(), len(down.a_SI), 0]
            for place, record in zip(places, records[1:], strict=True):
                up = trial.adapter.ups.get(place)
                place_at = down.spans[place].start if up is not None else 0
                wanted = (
                    [0] * 4 if up is None else [up.b_RO.data_ptr(), up.grad_b_RO.data_ptr(), len(up.b_RO), place_at]
                )
                assert record == wanted
        assert not table.on_device[-1, table.at + 5 : table.at + 9].any()
    for name in one_lane.residents:
        one_lane.release(name)


def test_attention_is_not_prepared_for_every_length(spec: SweepSpec) -> None:
    """As cuDNN's is (pytorch/pytorch#155958); whoever runs the model himself has it as it was."""
    attention = PackedAttention(load_base(spec.base, "cpu").model)
    ours = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for before in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(before)
            with attention.on():
                with attention.on():  # another thread's pass
                    assert not torch.backends.cuda.cudnn_sdp_enabled()
                assert not torch.backends.cuda.cudnn_sdp_enabled()
            assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(ours)


def test_pack_of_eight_differs_by_nothing(engine: Engine, spec: SweepSpec) -> None:
    """For the notes: printed with -s."""
    values = {"rank": 8, "dropout": 0.1, "target_modules": "all-linear", "learning_rate": 5e-3, "steps": STEPS}
    guests = [Stay(trial_config(spec, values | {"seed": seed}), 0, STEPS) for seed in range(8)]
    worst = [
        max(abs(a / b - 1) for a, b in zip(losses, next(iter(run_pack(engine, [guest])))[0], strict=True))
        for guest, (losses, _) in zip(guests, run_pack(engine, guests), strict=True)
    ]
    print(f"largest relative difference of a loss: {max(worst):.1e}, median {statistics.median(worst):.1e}")
    assert max(worst) == 0


@pytest.fixture
def short_of_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Makes a pass run out of memory where it holds more than so many trials."""
    train, measure = engine._packed.train, engine._packed.measure
    tokens, together = engine._measure.tokens, engine._measure.together

    def limit(trials: int) -> None:
        def checked(run: Callable[[Pack], Any], pack: Pack) -> Any:
            out = run(pack)  # the memory runs out late: gradients are there already
            if len(pack.parts) > trials:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return out

        monkeypatch.setattr(engine._packed, "train", partial(checked, train))
        monkeypatch.setattr(engine._packed, "measure", partial(checked, measure))

    yield limit
    engine.pack_limit = None
    engine._measure.tokens, engine._measure.together = tokens, together
    for trial in engine.residents:
        engine.release(trial)


def test_pack_that_runs_out_of_memory_is_split_and_loses_nothing(
    engine: Engine, spec: SweepSpec, short_of_memory: Callable[[int], None]
) -> None:
    configs = [trial_config(spec, {"rank": 4 + index, "seed": index, "dropout": 0.1}) for index in range(8)]
    undisturbed = five_losses(engine, configs, range(8))
    short_of_memory(2)
    assert five_losses(engine, configs, range(8)) == undisturbed
    assert engine.pack_limit == 2


def test_trial_too_large_alone_fails_with_that_reason_and_no_other(
    engine: Engine, spec: SweepSpec, short_of_memory: Callable[[int], None]
) -> None:
    engine.admit("a", trial_config(spec, {"rank": 4}))
    short_of_memory(0)
    outcome = engine.step(["a"])["a"]
    assert isinstance(outcome, TrialFailed)
    assert str(outcome).startswith(OUT_OF_MEMORY)
    assert engine.position("a") == 0
    short_of_memory(1)
    assert losses_of(engine.step(["a"]))  # the engine lives on


@pytest.mark.parametrize("run", ["train", "measure", "optimiser"])
@pytest.mark.parametrize("flat", [True, False], ids=["together", "one-by-one"])
def test_trials_that_find_no_memory_beside_others_are_sent_away_one_at_a_time(
    engine: Engine,
    spec: SweepSpec,
    monkeypatch: pytest.MonkeyPatch,
    short_of_memory: Callable[[int], None],
    run: str,
    flat: bool,
) -> None:
    """Also on bases that train one by one, where each is alone in its pass, but not on the host."""
    monkeypatch.setattr(engine._packed, "flat", flat)
    module, name = (finish_module, "step_together") if run == "optimiser" else (engine._packed, run)
    whole, fits = getattr(module, name), 2

    def short(given: Any) -> Any:
        if len(engine.residents) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return whole(given)

    for index in range(4):
        engine.admit(str(index), trial_config(spec, {"rank": 4 + index, "seed": index}))
    monkeypatch.setattr(module, name, short)
    ask = engine.report if run == "measure" else engine.step
    for residents in (4, 3):
        before = {trial: engine.position(trial) for trial in engine.residents}
        ((trial, outcome),) = ask(engine.residents).items()
        assert isinstance(outcome, HostFailed)
        assert str(outcome).startswith(f"{OUT_OF_MEMORY} at step {int(run != 'measure')}, with {residents} trials")
        assert engine.pack_limit is not None
        assert 1 <= engine.pack_limit <= residents - 1
        assert {trial: engine.position(trial) for trial in engine.residents} == before
        engine.release(trial)
    assert flat or run == "measure" or engine.pack_limit == 2
    outcomes = ask(engine.residents)
    assert len(outcomes) == 2
    assert not [outcome for outcome in outcomes.values() if isinstance(outcome, TrialFailed | HostFailed)]
    engine.release(engine.residents[0])
    fits = 0
    (outcome,) = ask(engine.residents).values()
    assert isinstance(outcome, TrialFailed)
    assert str(outcome).startswith(OUT_OF_MEMORY)


def test_optimiser_that_finds_no_memory_for_all_steps_some_at_a_time(
    engine: Engine, spec: SweepSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [trial_config(spec, {"rank": 4 + index, "seed": index, "dropout": 0.1}) for index in range(8)]
    undisturbed = five_losses(engine, configs, range(8))
    together = finish_module.step_together

    def short(optimizers: Sequence[torch.optim.AdamW]) -> None:
        if len(optimizers) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        together(optimizers)

    monkeypatch.setattr(finish_module, "step_together", short)
    assert five_losses(engine, configs, range(8)) == undisturbed
    assert engine.pack_limit == 2
    engine.pack_limit = None


class Noting:
    """A gauge that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[list[int], list[int]]] = []

    def trial_bytes(self, config: TrialConfig) -> int:
        return 0

    def saw(self, configs: Sequence[TrialConfig], peak: int, passing: Sequence[TrialConfig]) -> None:
        assert peak > 0
        self.told.append(([config.lora.rank for config in configs], [config.lora.rank for config in passing]))


def test_gauge_is_told_which_residents_were_in_a_pass_at_once(
    engine: Engine, spec: SweepSpec, monkeypatch: pytest.MonkeyPatch, short_of_memory: Callable[[int], None]
) -> None:
    gauge = Noting()
    monkeypatch.setattr(engine, "_gauge", gauge)
    for rank in (1, 2, 3, 4):
        engine.admit(str(rank), trial_config(spec, {"rank": rank, "batch_size": 1 if rank < 4 else 2}))

    def told(*trials: str) -> list[tuple[list[int], list[int]]]:
        for _ in range(2):
            losses_of(engine.step(trials))
        gauge.told.clear()
        engine.report(trials)
        return gauge.told

    losses_of(engine.step(["1"]))
    assert told("1", "2") == [([1, 2, 3, 4], [1]), ([1, 2, 3, 4], [1, 2])]
    assert told("3") == [([1, 2, 3, 4], [3])]
    gauge.told.clear()
    engine.report(["3"])
    assert not gauge.told  # nothing was trained since
    engine.release("3")
    short_of_memory(1)
    lanes = engine._lanes.count
    ((residents, passing),) = told("1", "2", "4")
    assert residents == [1, 2, 4]
    assert len(passing) == lanes
    assert passing[-1] == 4  # who has most rows
    short_of_memory(8)
    engine.pack_limit = None
    monkeypatch.setattr(engine._packed, "flat", False)
    assert told("1", "2", "4") == [([1, 2, 4], [1, 2, 4])]  # one by one: memory knows


def test_optimisers_step_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out for the last parameter has changed none of the others."""
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (3, 4)]
    optimizers = [torch.optim.AdamW([parameter], lr=0.1) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    empty_like = torch.empty_like

    def short(tensor: torch.Tensor) -> torch.Tensor:
        if len(tensor) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return empty_like(tensor)

    monkeypatch.setattr(torch, "empty_like", short)
    with pytest.raises(torch.OutOfMemoryError):
        step_together(optimizers)
    assert all(torch.equal(parameter.data, torch.ones_like(parameter)) for parameter in parameters)
    assert all(
        int(optimizer.state[parameter]["step"]) == 0
        for optimizer, parameter in zip(optimizers, parameters, strict=True)
    )
    monkeypatch.undo()
    step_together(optimizers)
    assert all(
        int(optimizer.state[parameter]["step"]) == 1
        for optimizer, parameter in zip(optimizers, parameters, strict=True)
    )


@pytest.mark.parametrize("run", ["train", "measure"])
def test_fault_in_one_trials_pass_is_no_other_trials(
    engine: Engine, spec: SweepSpec, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    configs = [trial_config(spec, {"rank": 4 + index, "seed": index}) for index in range(5)]
    undisturbed = five_losses(engine, configs, range(5))
    for index, config in enumerate(configs):
        engine.admit(str(index), config)
    bad, whole = engine._trials["3"].adapter, getattr(engine._packed, run)

    def faulty(pack: Pack) -> Any:
        out = whole(pack)
        if any(part.share.adapter is bad for part in pack.parts):
            raise IndexError("index out of range in self")
        return out

    monkeypatch.setattr(engine._packed, run, faulty)
    names = list(engine.residents)
    outcomes = engine.step(names) if run == "train" else engine.report(names)
    assert str(outcomes.pop("3")) == f"IndexError: index out of range in self at step {int(run == 'train')}"
    assert not [outcome for outcome in outcomes.values() if isinstance(outcome, TrialFailed)]
    engine.release("3")
    monkeypatch.undo()
    for name in list(engine.residents):
        engine.release(name)
    assert five_losses(engine, configs, range(5)) == undisturbed


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_error_of_the_device_is_no_trials_failure(
    engine: Engine, spec: SweepSpec, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(pack: Pack) -> Any:
        raise error

    engine.admit("a", trial_config(spec, {"rank": 4}))
    monkeypatch.setattr(engine._packed, "train", broken)
    monkeypatch.setattr(engine._packed, "measure", broken)
    for ask in (engine.step, engine.report):
        with pytest.raises(HostFailed, match=re.escape(str(error))):
            ask(["a"])
    engine.release("a")
    monkeypatch.setattr(engine._packed, "_logits_MV", broken)
    with pytest.raises(HostFailed, match=re.escape(str(error))):  # and not that such a base does not run
        engine._packed._find_out()
    monkeypatch.setattr(engine._packed, "_natively", lambda pack: torch.zeros(1))
    monkeypatch.setattr(engine._packed, "_find_bend", lambda pack: None)
    with pytest.raises(HostFailed, match=re.escape(str(error))):
        engine._packed._find_out()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("can't start new thread")], ids=["disk", "threads"]
)
def test_error_of_the_machine_is_no_trials_failure(
    engine: Engine, spec: SweepSpec, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """As where Triton compiles. Such a host would take one trial after the other, and fail it."""

    def broken(pack: Pack) -> Any:
        raise error

    for index in range(2):
        engine.admit(str(index), trial_config(spec, {"rank": 4}))
    monkeypatch.setattr(engine._packed, "train", broken)
    with pytest.raises(HostFailed, match=re.escape(str(error))):
        engine.step(["0", "1"])
    for index in range(2):
        engine.release(str(index))


def test_trial_that_finds_no_memory_as_it_is_admitted_is_too_large_and_leaves_nothing(
    engine: Engine, spec: SweepSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nSee documentation")

    engine.admit("resident", trial_config(spec, {"rank": 4}))
    monkeypatch.setattr("lora_search.engine.engine.FlatAdapter", full)
    with pytest.raises(TrialFailed, match=r"^out of memory at step 0, .*: CUDA out of memory. Tried to [\w. ]+$"):
        engine.admit("new", trial_config(spec, {"rank": 4}))
    monkeypatch.undo()
    assert list(engine.residents) == ["resident"]
    engine.admit("new", trial_config(spec, {"rank": 4}))
    for trial in ("new", "resident"):
        engine.release(trial)


def test_what_no_device_like_this_can_do_is_said_of_the_base(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(pack: Pack) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(engine._packed, "_logits_MV", unable)
    with pytest.raises(InputError, match="no kernel image is available"):
        engine._packed._find_out()


def test_evaluation_tells_the_loss_of_each_row(engine: Engine, spec: SweepSpec) -> None:
    engine.admit("trial", trial_config(spec, {"rank": 4}))
    losses_of(engine.step(["trial"]))
    found = engine.evaluate(["trial"], "test", by_row=True)["trial"]
    assert found.losses_N is not None
    assert found.targets_N is not None
    rows = engine.data.test
    for row in range(len(rows.lengths_N)):
        tokens, trained = rows.row(row)
        assert found.targets_N[row] == sum(trained[1:])
    assert found.losses_N.sum() / found.targets_N.sum() == pytest.approx(found.loss, rel=1e-6)
    tokens, trained = rows.row(2)
    alone = evaluate(
        load_base(spec.base, "cpu"),
        TokenSplit(tokens, trained, np.array([0, len(tokens)])),
        engine.data.pad_token_id,
    )
    plain = engine.untrained("test")
    assert plain.losses_N is not None
    assert plain.losses_N[2] / alone.targets == pytest.approx(alone.loss, rel=1e-5)


def test_interval_of_a_loss_is_that_of_rows_drawn_anew() -> None:
    generator = np.random.default_rng(1)
    targets_N = np.full(400, 10)
    losses_N = targets_N * generator.normal(2.0, 0.5, 400)
    low, high = loss_interval(Evaluation(float(losses_N.sum() / 4000), 0.0, 4000, losses_N, targets_N))
    assert (low + high) / 2 == pytest.approx(losses_N.sum() / 4000, abs=0.005)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 400**0.5, rel=0.15)
    same = Evaluation(2.0, 0.0, 4000, 2.0 * targets_N, targets_N)
    assert loss_interval(same) == (2.0, 2.0)


def admit_eight(engine: Engine, spec: SweepSpec) -> list[str]:
    names = [str(index) for index in range(8)]
    for index, name in enumerate(names):
        engine.admit(name, trial_config(spec, {"rank": 4 + index, "seed": index}))
    losses_of(engine.step(names))
    return names


@pytest.mark.parametrize("fitting", [1, 3])
def test_evaluation_that_runs_out_of_memory_measures_fewer_at_once(
    engine: Engine, spec: SweepSpec, short_of_memory: Callable[[int], None], fitting: int
) -> None:
    names = admit_eight(engine, spec)
    undisturbed = {name: found.loss for name, found in engine.evaluate(names).items()}
    engine._measure.together = 8
    short_of_memory(fitting)
    found = engine.evaluate(names)
    assert engine._measure.together == {1: 1, 3: 2}[fitting]
    assert {name: found[name].loss for name in names} == undisturbed


@pytest.mark.parametrize("fitting", [100, 10])
def test_evaluation_that_has_no_memory_for_one_trials_rows_measures_fewer_rows(
    engine: Engine,
    spec: SweepSpec,
    short_of_memory: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    fitting: int,
) -> None:
    names = admit_eight(engine, spec)
    undisturbed = {name: found.loss for name, found in engine.evaluate(names).items()}
    longest = int(engine.data.validation.lengths_N.max())
    short_of_memory(8)  # which puts all back in the end
    measure = engine._packed.measure

    def checked(pack: Pack) -> Any:
        if pack.inputs["input_ids"].numel() > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return measure(pack)

    monkeypatch.setattr(engine._packed, "measure", checked)
    if fitting < longest:
        with pytest.raises(torch.OutOfMemoryError):
            engine.evaluate(names)
    else:
        found = engine.evaluate(names)
        assert {name: found[name].loss for name in names} == pytest.approx(undisturbed, rel=1e-6)
    assert engine._measure.together == 1
    assert engine._measure.tokens <= max(fitting, longest)


@pytest.mark.parametrize("tokens", [64, 4096])
def test_evaluation_alone_and_in_company_says_the_same_to_the_bit(
    engine: Engine, spec: SweepSpec, short_of_memory: Callable[[int], None], tokens: int
) -> None:
    """A sum's last bits depend on what is summed together: always the same rows of a trial."""
    names = admit_eight(engine, spec)
    short_of_memory(8)  # which puts all back in the end
    engine._measure.tokens = tokens
    together = engine.evaluate(names, by_row=True)
    for company in (names[:1], names[2:5], names[::-1]):
        for name, alone in engine.evaluate(company, by_row=True).items():
            assert alone == together[name]
            assert np.array_equal(alone.losses_N, together[name].losses_N)
