"""A base over several GPUs: laid out as planned, and a trial's result does not depend on where its parts lie."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import SHARED, make_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_devices import Devices, MixedDevices, pretend
from test_faults import COMPARED

from lora_search.engine import Engine, StepMetrics
from lora_search.errors import InputError
from lora_search.memory import BaseMemory, Setup, TrialShape, weigh
from lora_search.memory.split import Split, balance, split_base
from lora_search.memory.weights import parameter_bytes
from lora_search.model import FrozenBase, load_base
from lora_search.model.borders import attach_borders
from lora_search.space import trial_config
from lora_search.targets import resolve, skeleton

if TYPE_CHECKING:
    from lora_search.data import TokenizedData
    from lora_search.placement import HostPlace
    from lora_search.spec import SweepSpec

CONFIGS = sorted(path.name for path in (SHARED / "configs").glob("*")) or ["(no shared data)"]
GPU = Setup("cuda", "bfloat16", validation_tokens=20_000)
GB = 10**9

TRIALS = [
    {"rank": 4, "dropout": 0.1, "target_modules": "all-linear", "learning_rate": 3e-3},
    {"rank": 8, "dropout": 0.0, "target_modules": "attention-qv", "learning_rate": 1e-3, "batch_size": 2},
    {"rank": 2, "dropout": 0.05, "target_modules": "re:.*1.*up_proj", "learning_rate": 1e-3},
]
"""Of both layers, some of both, and of the second alone."""


# The layout


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(0, 20), st.integers(1, 7))
def test_blocks_are_balanced_as_well_as_can_be(sizes: list[int], first: int, parts: int) -> None:
    parts = min(parts, len(sizes))

    def largest(spans: Sequence[range]) -> int:
        return max(sum(sizes[s.start : s.stop]) + (first if s.start == 0 else 0) for s in spans)

    found = balance(sizes, first, parts)
    assert [index for span in found for index in span] == list(range(len(sizes)))
    assert all(found)
    cuts = combinations(range(1, len(sizes)), parts - 1)
    assert largest(found) == min(
        largest([range(a, b) for a, b in zip((0, *cut), (*cut, len(sizes)), strict=True)]) for cut in cuts
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_has_one_gpu_and_blocks_stay_whole(name: str) -> None:
    if not (SHARED / "configs" / name).is_dir():
        pytest.skip("needs the shared data beside the project")
    model = skeleton(str(SHARED / "configs" / name))
    setup = replace(GPU, gpus=3, gpu_bytes=20 * GB)
    split = split_base(model, setup)
    assert sum(split.base) == weigh(model, setup).total
    devices = split.device_map((0, 1, 2))
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        parts = [part for part in devices if parameter == part or parameter.startswith(f"{part}.")]
        assert [devices[part] for part in parts] == [split.gpu_of(parameter)]
    tied = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {module: name for name, module in model.named_modules()}
    assert {split.gpu_of(names[module]) for module in tied} == {0}


def test_parameters_weigh_what_the_base_weighs(tiny_spec: SweepSpec) -> None:
    model = skeleton(tiny_spec.base.model)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert sum(parameter_bytes(model, GPU).values()) + buffers == weigh(model, GPU).total


def test_more_gpus_than_blocks_are_refused(tiny_spec: SweepSpec) -> None:
    said = r"hosts\.gpus_per_host: found 3; LlamaForCausalLM has 2 decoder blocks to lay on them; allowed: at most 2"
    with pytest.raises(InputError, match=said):
        split_base(skeleton(tiny_spec.base.model), replace(GPU, gpus=3))


def test_blocks_that_share_a_weight_are_refused(tiny_spec: SweepSpec) -> None:
    model = skeleton(tiny_spec.base.model)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(InputError, match=r"hosts\.gpus_per_host: found 2; decoder blocks of .* share .*up_proj"):
        split_base(model, replace(GPU, gpus=2))


# Memory


def test_fullest_gpu_decides_how_many_trials_fit() -> None:
    path = SHARED / "configs" / "llama-2-13b"
    if not path.is_dir():
        pytest.skip("needs the shared data beside the project")
    one = BaseMemory(skeleton(str(path)), GPU)
    shape = TrialShape(resolve(one.tree, "attention"), 16, True, 1, 512)
    capacity = 23 * GB
    two, three = one.over(2, capacity), one.over(3, capacity)
    fit = [memory.together(shape, capacity) for memory in (one, two, three)]
    assert 2 * fit[0] < fit[1]  # a second copy of the base is saved as well
    assert fit[1] < fit[2]
    assert two.host([shape] * fit[1]).total <= capacity < two.host([shape] * (fit[1] + 1)).total
    assert two.split is not None
    assert max(two.split.base) < one.weights.total == sum(two.split.base)


def test_gpus_share_a_trials_memory_and_leave_nothing_out() -> None:
    """Layers of a pass before the adapted ones keep nothing, those behind them do, on whichever GPU they are."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    one = BaseMemory(model, GPU)
    two = one.over(2, 100 * GB)
    assert two.split is not None
    upper, lower = (
        TrialShape(resolve(one.tree, f"re:.*layers.{layers}.self_attn.q_proj"), 8, False, 2, 64)
        for layers in ("[4-7]", "[0-3]")
    )
    assert two.split.spans == (range(4), range(4, 8))
    for shape in (upper, lower):
        whole = one.trial(shape)
        parts = [two._trial(shape, piece) for piece in two._pieces]
        assert sum(part.state for part in parts) == whole.state
        hidden = shape.tokens * 64 * 4
        together = sum(part.activations for part in parts)
        assert whole.activations <= together <= whole.activations + 8 * hidden  # what stands around the blocks, twice
    first, second = ([two._trial(shape, piece) for piece in two._pieces] for shape in (upper, lower))
    nothing = 5 * hidden  # but what stands around the blocks
    assert first[0].activations < nothing < first[1].activations
    assert second[1].activations > nothing  # a gradient passes through, though nothing there is adapted


# The engine


def dispatched(base: FrozenBase, devices: Devices) -> FrozenBase:
    """The tiny base with its second block on a second device, as `load_base` would have it there."""
    places = (torch.device("cpu", 0), torch.device("cpu", 1))
    split = Split(
        "model.layers",
        (range(1), range(1, 2)),
        (0, 0),
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"),
    )
    for name, tensor in (*base.model.named_parameters(), *base.model.named_buffers()):
        devices.put(tensor, places[split.gpu_of(name)])
        for part in _quant_state(tensor):
            devices.put(part, places[split.gpu_of(name)])
    attach_borders(base.model, split.device_map(places))
    if base.model.is_gradient_checkpointing:  # torch's own check looks at devices from where they cannot be pretended
        base.model.gradient_checkpointing_enable({"use_reentrant": False, "determinism_check": "none"})
    return replace(base, device=places[0], others=places[1:])


def _quant_state(weight: torch.Tensor) -> list[torch.Tensor]:
    state = getattr(weight, "quant_state", None)
    if state is None:
        return []
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def train(engine: Engine, spec: SweepSpec, steps: int) -> tuple[list[torch.Tensor], list[float], list[float]]:
    """Gradients before the first step, all losses, and the evaluation's, of trials that join one after the other."""
    gradients: list[torch.Tensor] = []
    losses: list[float] = []
    for step in range(steps):
        if step < len(TRIALS):
            engine.admit(str(step), trial_config(spec, {**TRIALS[step], "max_grad_norm": 0.0}))
        gradients += [gradient.clone() for gradient in engine.gradients(engine.residents).values()]
        for outcome in engine.step(engine.residents).values():
            assert isinstance(outcome, StepMetrics)
            losses.append(outcome.loss)
    reports = engine.report(engine.residents)
    return gradients, losses, [report.eval_loss for report in reports.values()]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_two_devices_train_as_one_to_the_bit(
    tiny: Path, tiny_data: TokenizedData, quantization: str, checkpointing: bool
) -> None:
    spec = make_spec(tiny, base={"quantization": quantization, "gradient_checkpointing": checkpointing})
    alone = train(Engine(load_base(spec.base, "cpu"), tiny_data), spec, 5)
    base = load_base(spec.base, "cpu")
    with pretend() as devices:
        engine = Engine(dispatched(base, devices), tiny_data)
        together = train(engine, spec, 5)
        adapters = [trial.adapter for trial in engine._trials.values()]
        assert [[str(v.device) for v in adapter.vectors] for adapter in adapters] == [
            ["cpu:0", "cpu:1"],
            ["cpu:0", "cpu:1"],
            ["cpu:1"],
        ]
        assert devices.copies > 0
    assert alone[1:] == together[1:]
    assert all(torch.equal(one, other) for one, other in zip(alone[0], together[0], strict=True))


def test_a_pretend_device_minds_what_a_gpu_minds(tiny_base: FrozenBase, tiny_data: TokenizedData) -> None:
    """The check above can fail: without borders, the second block is given what lies on the first device."""
    with pretend() as devices:
        base = dispatched(tiny_base, devices)
        for module in base.model.modules():
            module._forward_pre_hooks.clear()
        with pytest.raises(MixedDevices):
            Engine(base, tiny_data)


def test_checkpoint_goes_from_two_devices_to_one(
    tiny_spec: SweepSpec, tiny_base: FrozenBase, tiny_data: TokenizedData
) -> None:
    """A sweep may be resumed with other `hosts`: what a checkpoint holds does not depend on where layers lie."""
    config = trial_config(tiny_spec, {**TRIALS[0], "max_grad_norm": 0.0})
    alone = Engine(load_base(tiny_spec.base, "cpu"), tiny_data)
    with pretend() as devices:
        both = Engine(dispatched(tiny_base, devices), tiny_data)
        both.admit("0", config)
        for _ in range(3):
            both.step(["0"])
        checkpoint = both.snapshot("0")
        both.release("0")
        both.admit("0", config, checkpoint)  # and back onto two
        there = both.step(["0"])["0"]
    alone.admit("0", config, checkpoint)
    here = alone.step(["0"])["0"]
    assert isinstance(here, StepMetrics)
    assert isinstance(there, StepMetrics)
    assert (here.step, here.loss) == (there.step, there.loss)
    assert here.grad_norm == pytest.approx(there.grad_norm)  # summed in another order


def build_over_two(spec: SweepSpec, place: HostPlace, capacity: int, data: TokenizedData) -> Engine:
    """The engine of a host with two of Ray's logical GPUs, on as many pretended ones; all of it is on one thread."""
    assert (place.gpus, place.threads) == (2, 1)
    torch.set_num_threads(1)
    base = load_base(spec.base, "cpu")
    pretending = pretend()
    devices = pretending.__enter__()
    engine = Engine(dispatched(base, devices), data)
    weakref.finalize(engine, pretending.__exit__, None, None, None)  # on the host's thread, before it merges
    step = engine.step

    def minded(trials: Sequence[str]) -> Any:
        before = devices.copies
        outcomes = step(trials)
        assert devices.copies > before, "nothing has gone from one device to the other"
        return outcomes

    engine.step = minded  # type: ignore[method-assign]
    return engine


@pytest.mark.slow
def test_sweep_whose_base_is_over_two_devices_comes_to_what_it_does_on_one(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `gpus_per_host: 2`, from the first trial to the merged model."""
    import ray
    from ray.cluster_utils import Cluster

    from lora_search.results import run_rows
    from lora_search.rundir import create_run
    from lora_search.sweep import run as module

    if ray.is_initialized():
        ray.shutdown()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # hosts are to find this file
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 2, "include_dashboard": False})
    rows, merged = [], []
    try:
        for name, build in (("one", module.build_engine), ("two", build_over_two)):
            hosts = {"gpus_per_host": 2 if name == "two" else 0, "cpus_per_host": 1, "trials_per_host": 1}
            spec = make_spec(tiny, name=name, hosts=hosts, search={"trials": 4}, output=str(tmp_path))
            monkeypatch.setattr(module, "build_engine", build)
            run = create_run(tmp_path, name, exact=True)
            module.run_sweep(spec, run, address=cluster.address)
            rows.append([{key: row[key] for key in COMPARED} for row in run_rows(run)])
            merged.append((run.best / "merged" / "model.safetensors").read_bytes())
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4
    assert merged[0] == merged[1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_as_one(tiny: Path, tiny_data: TokenizedData) -> None:
    spec = make_spec(tiny, base={"compute_dtype": "auto"})
    alone = train(Engine(load_base(spec.base, "cuda:0"), tiny_data), spec, 8)
    split = split_base(skeleton(spec.base.model), replace(GPU, gpus=2))
    base = load_base(spec.base, "cuda:0", [torch.device("cuda", 1)], split)
    assert {parameter.device.index for parameter in base.model.parameters()} == {0, 1}
    engine = Engine(base, tiny_data)
    together = train(engine, spec, 8)
    assert together[1] == pytest.approx(alone[1], rel=1e-3)
    assert together[2] == pytest.approx(alone[2], rel=1e-3)
    for trial in engine.residents:
        engine.release(trial)
