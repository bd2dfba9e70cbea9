"""The engine: a trial's result is its own."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import flip_bit, make_spec, write_tiny_data
from safetensors.torch import load as load_tensors

from lora_search.checkpoint import ADAPTER_WEIGHTS, OPTIMIZER, TRIAL, read_checkpoint, seal, write_checkpoint
from lora_search.data import TokenizedData, TokenSplit
from lora_search.engine import Engine, Report, StepMetrics
from lora_search.engine.layers import LinearSite
from lora_search.errors import HostFailed, InputError, SweepError, TrialFailed
from lora_search.model import load_base
from lora_search.model.precision import quantised_linears
from lora_search.space import TrialConfig, trial_config
from lora_search.storage import Folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lora_search.model import FrozenBase
    from lora_search.spec import SweepSpec


@pytest.fixture
def engine(tiny_base: FrozenBase, tiny_data: TokenizedData) -> Engine:
    return Engine(tiny_base, tiny_data)


def config(spec: SweepSpec, **sampled: Any) -> TrialConfig:
    return trial_config(spec, {"rank": 4, "dropout": 0.1, "learning_rate": 5e-3, **sampled})


def train(engine: Engine, trial: str, steps: int) -> list[float]:
    """The losses of some steps of one trial."""
    losses = []
    for _ in range(steps):
        outcome = engine.step([trial])[trial]
        assert isinstance(outcome, StepMetrics), outcome
        losses.append(outcome.loss)
    return losses


def report_of(engine: Engine, trial: str) -> Report:
    """The report of one trial."""
    outcome = engine.report([trial])[trial]
    assert isinstance(outcome, Report), outcome
    return outcome


def test_training_lowers_the_validation_loss(engine: Engine, tiny_spec: SweepSpec) -> None:
    untrained = engine.untrained().loss
    engine.admit("a", config(tiny_spec, learning_rate=3e-2, steps=40))
    train(engine, "a", 40)
    assert report_of(engine, "a").eval_loss < 0.97 * untrained


def test_fresh_adapter_changes_nothing(engine: Engine, tiny_spec: SweepSpec) -> None:
    untrained = engine.untrained()
    engine.admit("a", config(tiny_spec))
    assert engine.evaluate(["a"])["a"] == untrained


def test_untrained_base_can_be_measured_at_any_time(engine: Engine, tiny_spec: SweepSpec) -> None:
    untrained = engine.untrained()
    engine.admit("a", config(tiny_spec, learning_rate=1e-1))
    first = train(engine, "a", 2)
    assert engine.untrained() == untrained
    second = train(engine, "a", 2)
    engine.release("a")
    assert engine.untrained() == untrained
    engine.admit("a", config(tiny_spec, learning_rate=1e-1))
    assert train(engine, "a", 4) == first + second


def test_trial_is_the_same_alone_and_in_company(engine: Engine, tiny_spec: SweepSpec) -> None:
    mine = config(tiny_spec, target_modules="all-linear")
    engine.admit("alone", mine)
    alone = train(engine, "alone", 6)
    weights = engine.snapshot("alone")[ADAPTER_WEIGHTS]
    engine.release("alone")

    engine.admit("before", config(tiny_spec, rank=8, seed=7))
    train(engine, "before", 1)
    engine.admit("mine", mine)
    engine.admit("beside", config(tiny_spec, rank=2, target_modules="attention-qv", dropout=0.5))
    losses = []
    for step in range(6):
        outcomes = engine.step(["beside", "mine"] if step < 3 else ["mine"])
        mine_now = outcomes["mine"]
        assert isinstance(mine_now, StepMetrics)
        losses.append(mine_now.loss)
        report_of(engine, "beside" if step < 3 else "mine")
        if step == 3:
            engine.release("before")
    assert losses == alone
    assert engine.snapshot("mine")[ADAPTER_WEIGHTS] == weights


def test_dense_weights_are_kept_where_they_are_small_and_change_no_bit(
    tiny_data: TokenizedData, tiny_spec: SweepSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses_and_calls() -> tuple[list[float], float, int]:
        calls.clear()
        engine = Engine(load_base(tiny_spec.base, "cpu"), tiny_data)
        engine.admit("a", config(tiny_spec, target_modules="all-linear"))
        losses = train(engine, "a", 3)
        loss = report_of(engine, "a").eval_loss
        assert len(quantised_linears(engine.base.model)) == 14
        return losses, loss, len(calls)

    calls: list[str] = []
    dequantised = LinearSite._dequantised
    monkeypatch.setattr(LinearSite, "_dequantised", lambda site: calls.append("") or dequantised(site))
    *kept, few = losses_and_calls()
    monkeypatch.setattr("lora_search.engine.sites.KEPT_DENSE_BYTES", 1000)
    *anew, many = losses_and_calls()
    assert kept == anew
    assert few == 14
    assert many > 6 * 14


def test_training_leaves_the_global_random_state_alone(engine: Engine, tiny_spec: SweepSpec) -> None:
    before = torch.get_rng_state()
    engine.admit("a", config(tiny_spec))
    train(engine, "a", 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_decides_initialisation_dropout_and_order(engine: Engine, tiny_spec: SweepSpec) -> None:
    for name, seed in (("zero", 0), ("again", 0), ("one", 1)):
        engine.admit(name, config(tiny_spec, seed=seed))
    zero, again, one = (train(engine, name, 3) for name in ("zero", "again", "one"))
    assert zero == again
    assert all(a != b for a, b in zip(zero, one, strict=True))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup", "inverse_sqrt"])
def test_restored_trial_goes_on_to_the_bit(
    engine: Engine, tiny_spec: SweepSpec, tiny_base: FrozenBase, tiny_data: TokenizedData, tmp_path: Path, schedule: str
) -> None:
    mine = config(tiny_spec, lr_schedule=schedule, gradient_accumulation_steps=2, weight_decay=0.01, warmup_ratio=0.3)
    engine.admit("whole", mine)
    whole = train(engine, "whole", 8)
    whole_report = report_of(engine, "whole")
    end = engine.snapshot("whole")
    engine.release("whole")

    engine.admit("part", mine)
    first = train(engine, "part", 4)
    report_of(engine, "part")
    write_checkpoint(engine.snapshot("part"), Folder(tmp_path / "checkpoint"))
    engine.release("part")

    engine.admit("other", config(tiny_spec, rank=2))  # somebody else has the host in between
    train(engine, "other", 1)
    engine.admit("part", mine, read_checkpoint(Folder(tmp_path / "checkpoint")))
    assert engine.position("part") == 4
    assert first + train(engine, "part", 4) == whole
    report = report_of(engine, "part")
    assert (report.eval_loss, report.tokens, report.lr) == (
        whole_report.eval_loss,
        whole_report.tokens,
        whole_report.lr,
    )
    snapshot = engine.snapshot("part")
    assert snapshot[ADAPTER_WEIGHTS] == end[ADAPTER_WEIGHTS]
    ours, theirs = load_tensors(snapshot[OPTIMIZER]), load_tensors(end[OPTIMIZER])
    assert ours.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_report_that_was_lost_is_made_again_from_the_checkpoint(engine: Engine, tiny_spec: SweepSpec) -> None:
    mine = config(tiny_spec)
    engine.admit("a", mine)
    train(engine, "a", 3)
    told = report_of(engine, "a")
    checkpoint = engine.snapshot("a")
    engine.release("a")
    engine.admit("a", mine, checkpoint)
    again = report_of(engine, "a")
    assert len(again.history) == 3
    assert again.seconds > told.seconds  # by the second evaluation alone
    assert again.seconds - told.seconds < told.seconds
    same = [replace(report, seconds=0.0, peak_memory_bytes=0) for report in (told, again)]
    assert same[0] == same[1]
    train(engine, "a", 2)
    assert [step.step for step in report_of(engine, "a").history] == [4, 5]


def test_checkpoint_holds_no_pickle_and_peft_loads_its_adapter(
    engine: Engine, tiny_spec: SweepSpec, tiny_data: TokenizedData, tmp_path: Path
) -> None:
    from peft import PeftModel

    from lora_search.engine import evaluate
    from lora_search.model import load_base

    engine.admit("a", config(tiny_spec))
    train(engine, "a", 3)
    loss = report_of(engine, "a").eval_loss
    write_checkpoint(engine.snapshot("a"), Folder(tmp_path))
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    base = load_base(tiny_spec.base, "cpu")
    PeftModel.from_pretrained(base.model, str(tmp_path))
    assert evaluate(base, tiny_data.validation, tiny_data.pad_token_id).loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, OPTIMIZER])
def test_damaged_checkpoint_is_noticed(engine: Engine, tiny_spec: SweepSpec, tmp_path: Path, name: str) -> None:
    engine.admit("a", config(tiny_spec))
    write_checkpoint(engine.snapshot("a"), Folder(tmp_path))
    flip_bit(tmp_path / name)
    with pytest.raises(SweepError, match=f"{name} is damaged"):
        read_checkpoint(Folder(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(SweepError, match="incomplete"):
        read_checkpoint(Folder(tmp_path))


def test_checkpoint_of_another_version_is_refused_in_one_line(engine: Engine, tiny_spec: SweepSpec) -> None:
    engine.admit("a", config(tiny_spec))
    whole = dict(engine.snapshot("a"))
    state = json.loads(whole.pop(TRIAL))
    del state["sha256"]
    engine.release("a")
    with pytest.raises(SweepError, match="checkpoint: found format 2; allowed: 3"):
        engine.admit("a", config(tiny_spec), seal(whole, state | {"format": 2}))
    assert not engine.residents
    engine.admit("a", config(tiny_spec), seal(whole, state))
    engine.release("a")


def test_position_in_the_data_is_in_the_checkpoint(engine: Engine, tiny_spec: SweepSpec) -> None:
    engine.admit("a", config(tiny_spec, gradient_accumulation_steps=3))
    train(engine, "a", 2)
    state = json.loads(engine.snapshot("a")[TRIAL])
    assert (state["step"], state["rows_read"]) == (2, 2 * 3 * 4)


def test_accumulation_is_one_larger_batch(engine: Engine, tiny_spec: SweepSpec) -> None:
    engine.admit("large", config(tiny_spec, dropout=0.0, batch_size=8))
    engine.admit("small", config(tiny_spec, dropout=0.0, batch_size=2, gradient_accumulation_steps=4))
    assert train(engine, "small", 6) == pytest.approx(train(engine, "large", 6), rel=1e-5)


def test_infinite_loss_fails_its_trial_and_no_other(engine: Engine, tiny_spec: SweepSpec) -> None:
    engine.admit("alone", config(tiny_spec))
    alone = train(engine, "alone", 4)
    engine.release("alone")
    engine.admit("good", config(tiny_spec))
    engine.admit("bad", config(tiny_spec, learning_rate=1e30, max_grad_norm=0.0, warmup_ratio=0.0, alpha=1e30))
    losses, failure = [], None
    for _ in range(4):
        outcomes = engine.step(["bad", "good"] if failure is None else ["good"])
        if isinstance(outcomes.get("bad"), TrialFailed):
            failure = outcomes["bad"]
            engine.release("bad")
        good = outcomes["good"]
        assert isinstance(good, StepMetrics)
        losses.append(good.loss)
    assert failure is not None
    assert "step" in str(failure)
    assert any(word in str(failure) for word in ("nan", "inf"))
    assert losses == alone


def test_clipping_bounds_the_update_and_reports_the_norm_before(engine: Engine, tiny_spec: SweepSpec) -> None:
    engine.admit("free", config(tiny_spec, max_grad_norm=0.0))
    engine.admit("clipped", config(tiny_spec, max_grad_norm=1e-3))
    outcomes = engine.step(["free", "clipped"])
    free, clipped = outcomes["free"], outcomes["clipped"]
    assert isinstance(free, StepMetrics)
    assert isinstance(clipped, StepMetrics)
    assert free.grad_norm == pytest.approx(clipped.grad_norm)
    assert free.grad_norm > 1e-3


def test_warm_up_and_schedule_are_those_of_transformers(engine: Engine, tiny_spec: SweepSpec) -> None:
    engine.admit("a", config(tiny_spec, steps=8, warmup_ratio=0.25, learning_rate=1e-3))
    rates = [engine.step(["a"])["a"].lr for _ in range(8)]  # type: ignore[union-attr]
    assert rates[:3] == pytest.approx([0.0, 5e-4, 1e-3])
    assert rates[3:] == pytest.approx([5e-4 * (1 + math.cos(math.pi * k / 6)) for k in range(1, 6)])


def test_rslora_scales_by_the_root_of_the_rank(engine: Engine, tiny_spec: SweepSpec) -> None:
    plain = config(tiny_spec, rank=4, alpha=8.0, use_rslora=True, dropout=0.0)
    same = config(tiny_spec, rank=4, alpha=16.0, dropout=0.0)  # 8 / sqrt(4) = 16 / 4
    assert plain.scaling == same.scaling == 4.0
    engine.admit("rslora", plain)
    engine.admit("lora", same)
    assert train(engine, "rslora", 4) == train(engine, "lora", 4)


def test_report_has_every_figure(engine: Engine, tiny_spec: SweepSpec, tiny_data: TokenizedData) -> None:
    engine.admit("a", config(tiny_spec, target_modules="attention-qv", rank=4))
    losses = train(engine, "a", 3)
    report = report_of(engine, "a")
    assert isinstance(report, Report)
    assert (report.step, report.steps_total) == (3, 8)
    assert report.train_loss == pytest.approx(sum(losses) / 3)
    assert report.perplexity == pytest.approx(math.exp(report.eval_loss))
    assert 0 <= report.token_accuracy <= 1
    assert report.trainable_parameters == 2 * (4 * (64 + 64) + 4 * (64 + 32))  # 2 layers; q is 64x64, v 64x32
    assert report.tokens == sum(step.tokens for step in report.history)
    assert report.tokens_per_second > 0
    assert report.peak_memory_bytes > 50 << 20
    assert report.trial_memory_bytes is None  # without a gauge nobody plans
    assert [step.step for step in report.history] == [1, 2, 3]
    train(engine, "a", 1)
    assert [step.step for step in report_of(engine, "a").history] == [4]


def test_released_trial_leaves_nothing_behind(engine: Engine, tiny_spec: SweepSpec, tiny_base: FrozenBase) -> None:
    for round_ in range(3):
        engine.admit("a", config(tiny_spec, seed=round_))
        train(engine, "a", 1)
        engine.release("a")
    assert not [name for name, _ in tiny_base.model.named_parameters() if "lora_" in name]
    assert not [p for p in tiny_base.model.parameters() if p.requires_grad or p.grad is not None]


def test_refused_trial_leaves_nothing_behind(engine: Engine, tiny_spec: SweepSpec, tiny_base: FrozenBase) -> None:
    with pytest.raises(InputError, match="nothing_like_it"):
        engine.admit("a", config(tiny_spec, target_modules=["nothing_like_it"]))
    engine.admit("b", config(tiny_spec))
    damaged = dict(engine.snapshot("b"))
    damaged[ADAPTER_WEIGHTS] = damaged[ADAPTER_WEIGHTS][:-1] + b"\x01"
    engine.release("b")
    with pytest.raises(SweepError):
        engine.admit("b", config(tiny_spec), damaged)
    assert engine.residents == ()
    assert not [name for name, _ in tiny_base.model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("residents", [0, 1])
def test_trial_that_cannot_be_made_whole_leaves_nothing_behind(
    engine: Engine, tiny_spec: SweepSpec, tiny_base: FrozenBase, monkeypatch: pytest.MonkeyPatch, residents: int
) -> None:
    from peft.tuners.lora.layer import LoraLayer

    def loras() -> list[str]:
        return [name for name, _ in tiny_base.model.named_parameters() if "lora_" in name]

    for trial in range(residents):
        engine.admit(f"resident-{trial}", config(tiny_spec))
    before, update = loras(), LoraLayer.update_layer
    calls: list[LoraLayer] = []

    def breaks_off(error: Exception) -> Callable[..., None]:
        def half(layer: LoraLayer, *args: Any, **kwargs: Any) -> None:
            calls.append(layer)
            if len(calls) > 3:
                raise error
            update(layer, *args, **kwargs)

        return half

    kinds: tuple[tuple[Exception, type[Exception], str], ...] = (
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            TrialFailed,
            r"^out of memory at step 0, .*: CUDA out .*\.$",
        ),
        (ValueError("no such shape"), TrialFailed, "^ValueError: no such shape at step 0$"),
        (OSError("No space left on device"), HostFailed, "^OSError: No space left on device$"),
    )
    for error, as_what, match in kinds:
        calls.clear()
        with monkeypatch.context() as patched:
            patched.setattr(LoraLayer, "update_layer", breaks_off(error))
            with pytest.raises(as_what, match=match):
                engine.admit("a", config(tiny_spec))
    assert loras() == before
    engine.admit("a", config(tiny_spec))
    engine.admit("b", config(tiny_spec))
    assert train(engine, "a", 3) == train(engine, "b", 3)
    assert [n.replace("trial_a", "trial_b") for n in loras() if "trial_a" in n] == [
        n for n in loras() if "trial_b" in n
    ]


def test_frozen_base_is_never_changed(engine: Engine, tiny_spec: SweepSpec, tiny_base: FrozenBase) -> None:
    before = {name: parameter.clone() for name, parameter in tiny_base.model.named_parameters()}
    engine.admit("a", config(tiny_spec, learning_rate=1e-1))
    train(engine, "a", 3)
    report_of(engine, "a")
    engine.release("a")
    after = {name.replace(".base_layer", ""): parameter for name, parameter in tiny_base.model.named_parameters()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_optimisers_step_together_as_each_would_alone() -> None:
    """Against torch's own AdamW, five steps, every hyperparameter different."""
    from lora_search.engine.adamw import clip_together, step_together

    settings: list[dict[str, Any]] = [
        {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
        {"lr": 1e-1, "betas": (0.0, 0.5), "eps": 1e-3, "weight_decay": 0.5},
    ]
    limits = [0.0, 0.5, 100.0]

    def made() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(size)) for size in (5, 17, 64)]

    ours, theirs = made(), made()
    together = [torch.optim.AdamW([p], **one) for p, one in zip(ours, settings, strict=True)]
    alone = [torch.optim.AdamW([p], **one, foreach=False) for p, one in zip(theirs, settings, strict=True)]
    for step in range(5):
        torch.manual_seed(step)
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn_like(other)
            mine.grad = other.grad.clone()
        gradients = [parameter.grad for parameter in ours if parameter.grad is not None]
        clip_together(gradients, [float(gradient.norm()) for gradient in gradients], limits)
        step_together(together[:2] if step == 2 else together)  # one may sit a step out
        for parameter, limit, optimizer in zip(theirs, limits, alone, strict=True):
            if limit:
                torch.nn.utils.clip_grad_norm_([parameter], limit)
            if step != 2 or optimizer is not alone[2]:
                optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    state, expected = (optimizers[1].state_dict()["state"][0] for optimizers in (together, alone))
    assert state.keys() == expected.keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_base_whose_code_does_not_run_on_quantised_weights_is_refused(tmp_path: Path) -> None:
    """Mamba multiplies with the weight of a linear layer itself, which as NF4 has another shape."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=100, state_size=8)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(str(tmp_path / "model"))
    write_tiny_data(tmp_path / "data.jsonl")
    split = TokenSplit(np.arange(8, dtype=np.int32), np.ones(8, np.bool_), np.array([0, 8]))
    data = TokenizedData(split, split, split, 0, "", 0, 0)
    with pytest.raises(InputError, match=r"base.quantization: MambaForCausalLM's own code .* nf4 .*; none may do"):
        Engine(load_base(make_spec(tmp_path).base, "cpu"), data)
    Engine(load_base(make_spec(tmp_path, base={"quantization": "none"}).base, "cpu"), data)
