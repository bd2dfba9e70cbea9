"""The plan of a sweep: how many steps, on how many seats, and one document of it all."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, make_spec, shared

from lora_search.cli import main
from lora_search.errors import InputError
from lora_search.memory import corners
from lora_search.placement import HostPlace, Node
from lora_search.plan import plan_sweep
from lora_search.plan.devices import GPUS, this_machine
from lora_search.plan.rows import row_facts
from lora_search.plan.schedule import BEST_SHARE, Rung, report_count, schedule, simulate
from lora_search.plan.work import base_work
from lora_search.space import report_steps, rungs, trial_config
from lora_search.spec import dump_spec, load_spec
from lora_search.sweep import capacity
from lora_search.sweep.prepare import prepare
from lora_search.targets import module_tree, skeleton

DEMO = ROOT / "sweeps" / "demo.yaml"


def in_order(qualities: Sequence[float]) -> Callable[[int], float]:
    left = iter(qualities)
    return lambda ended: next(left)


@pytest.mark.parametrize("factor", [2, 2.5, 3, 4])
def test_a_rung_decides_as_rays_own_scheduler_does(factor: float) -> None:
    from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

    draw = random.Random(0)
    for _ in range(20):
        scheduler = AsyncHyperBandScheduler(
            time_attr="step", metric="loss", mode="min", max_t=9, grace_period=8, reduction_factor=factor
        )
        rung, told = Rung(factor), []
        for trial in (SimpleNamespace(trial_id=str(number)) for number in range(30)):
            loss = draw.gauss(0, 1)
            scheduler.on_trial_add(None, trial)
            goes_on = scheduler.on_trial_result(None, trial, {"step": 8, "loss": loss}) == TrialScheduler.CONTINUE
            told.append(goes_on)
            assert rung.lets_on(-loss) == goes_on
        assert set(told) == {True, False}  # some go on, some are stopped


@pytest.mark.parametrize("seats", [1, 4, 24])
def test_simulated_sweep_goes_as_rays_scheduler_lets_it(seats: int) -> None:
    """Ray's scheduler in the place of ours, told by the clock of what each trial has come to."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

    draw = random.Random(seats)
    for _ in range(20):
        qualities = [draw.random() for _ in range(24)]
        scheduler = AsyncHyperBandScheduler(
            time_attr="step", metric="quality", mode="max", max_t=90, grace_period=10, reduction_factor=3
        )
        waiting, lengths = list(range(24)), [0] * 24
        running: dict[int, int] = {}
        while waiting or running:
            while waiting and len(running) < seats:
                running[waiting.pop(0)] = 0
            for trial in sorted(running):
                running[trial] += 10
                told = SimpleNamespace(trial_id=str(trial))
                if running[trial] == 10:
                    scheduler.on_trial_add(None, told)
                result = {"step": running[trial], "quality": qualities[trial]}
                if scheduler.on_trial_result(None, told, result) == TrialScheduler.STOP:
                    lengths[trial] = running.pop(trial)
        assert simulate(24, in_order(qualities), [10, 30], 90, 3, seats).lengths == lengths


def test_ever_better_trials_all_go_on_and_ever_worse_ones_do_not() -> None:
    better, worse = [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]
    assert simulate(4, in_order(better), [10, 30], 90, 3, seats=2).lengths == [90] * 4
    assert simulate(4, in_order(worse), [10, 30], 90, 3, seats=2).lengths == [90, 10, 10, 10]


def test_each_seat_takes_the_next_trial_when_it_is_free() -> None:
    even = simulate(4, in_order([0.4, 0.3, 0.2, 0.1]), [], 10, 3, seats=2)
    assert (even.ends, even.alone) == ([10, 10, 20, 20], 0)
    straggler = simulate(4, in_order([0.4, 0.3, 0.2, 0.1]), [10], 90, 3, seats=2)
    assert (straggler.lengths, straggler.ends, straggler.alone) == ([90, 10, 10, 10], [10, 20, 30, 90], 60)


def test_nothing_is_stopped_without_a_scheduler(tiny: Path) -> None:
    found = schedule(make_spec(tiny, search={"scheduler": {"name": "none"}}), seats=2)
    assert found.fewest == found.low == found.expected == found.unlearned == found.high == found.most == 64
    assert (found.efficiency, found.alone) == (1.0, 0.0)


def test_early_trials_are_let_through_where_a_rung_has_few_records() -> None:
    found = schedule(load_spec(DEMO, ["search.sampler.name=random"]), seats=4)
    assert found.expected > 1.25 * (10 * 16 + 30 * 5 + 90 * 3)  # what halving in step would take
    many = schedule(load_spec(DEMO, ["search.sampler.name=random", "search.trials=2000"]), seats=4)
    assert many.expected / 2000 == pytest.approx(10 + 20 / 3 + 60 / 9, rel=0.05)  # there the two are the same


def test_a_sampler_that_learns_lets_more_go_on() -> None:
    learning, drawing = (
        schedule(load_spec(DEMO, [f"search.sampler.name={name}"]), seats=4) for name in ("tpe", "random")
    )
    assert learning.unlearned == drawing.expected == drawing.unlearned
    assert learning.expected > 1.3 * drawing.expected
    from optuna.samplers._tpe.sampler import default_gamma

    assert default_gamma(100) == 100 * BEST_SHARE


def test_schedule_lies_between_its_bounds(tiny: Path) -> None:
    found = schedule(make_spec(tiny), seats=4)
    assert found.fewest < found.low < found.expected < found.high <= found.most
    assert (found.trials, found.fewest, found.most) == (8, 16, 64)
    assert 0 < found.alone < 1
    assert found == schedule(make_spec(tiny), seats=4)


def test_grid_has_no_more_trials_than_combinations(tiny: Path) -> None:
    space = {"rank": {"choice": [2, 4]}, "dropout": 0.0, "target_modules": "attention", "learning_rate": 1e-3}
    spec = make_spec(tiny, search={"space": space, "sampler": {"name": "grid"}, "trials": 50, "enqueue": None})
    assert schedule(spec, seats=2).trials == 2


def test_work_of_a_token_is_six_operations_a_number_without_a_frozen_gradient() -> None:
    model = skeleton(str(shared("configs") / "llama-3-8b"))
    work = base_work(model.config, module_tree(model), model.config.vocab_size)
    assert work.numbers == 6_979_321_856
    assert work.forward(0, 1) == pytest.approx(2 * 7.5e9, rel=0.01)  # all but the embedding
    assert work.training(0, 1, 0, checkpointing=False) == 2 * work.forward(0, 1)
    assert work.training(0, 1, 0, checkpointing=True) > 2.9 * work.forward(0, 1)


def test_plan_says_what_fits_and_what_it_takes(tiny: Path) -> None:
    found = plan_sweep(make_spec(tiny))
    assert found.rows.measured
    assert found.rows.longest <= 32
    assert found.sweep.train_tokens == pytest.approx(found.sweep.schedule.expected * 4 * found.rows.mean, abs=1)
    assert found.sweep.epochs == pytest.approx(8 * 4 / found.rows.train_rows)
    assert [device.name for device in found.devices[1:]] == [gpu.name for gpu in GPUS]
    for device in found.devices:
        assert device.smallest_recomputed >= device.smallest >= device.largest > 0
        assert not device.never
        assert device.seconds > 0
    assert found.refused is None


def test_trials_of_a_host_are_reckoned_as_they_are_trained(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With recomputed activations where the sweep file says so: more of them fit."""
    place = HostPlace("host-0", "here", cpus=2, gpus=0)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    keeping, recomputing = (
        make_spec(
            tiny,
            base={"gradient_checkpointing": on},
            search={"space": {"target_modules": "all-linear"}},
            training={"batch_size": 64},
            hosts={"count": 1, "gpus_per_host": 0},
        )
        for on in (False, True)
    )
    _, data = prepare(keeping, place)
    memory = capacity.memory_of(recomputing, place, 2, data)
    usable = memory.host([corners(recomputing, memory.tree, capacity._rows(data))[-1].shape] * 3).total
    monkeypatch.setattr("lora_search.plan.devices.usable_bytes", lambda device, hosts, trials: usable)
    for spec in (keeping, recomputing):
        found = plan_sweep(spec)
        here = found.devices[0]
        assert 1 <= here.largest < here.largest_recomputed == 3
        assert found.trials_per_host == found.sweep.schedule.seats == (3 if spec is recomputing else here.largest)


def test_time_on_other_devices_is_not_of_this_machine(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cores, trials in ((1, "auto"), (16, "auto"), (16, 1)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr("lora_search.plan.devices._measured_flops", lambda dtype: 1e11)
        found.append(plan_sweep(make_spec(tiny, hosts={"trials_per_host": trials})))
    few, many, one_by_one = found
    assert few.hosts * few.trials_per_host < many.hosts * many.trials_per_host
    assert few.devices[1:] == many.devices[1:]
    gpu, slow = many.devices[-1], one_by_one.devices[-1]
    assert slow.seconds == pytest.approx(16 * gpu.seconds, rel=0.2)  # it waits for launches, which packs share


def test_plan_goes_on_without_a_tokenizer_and_says_so(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = make_spec(tiny, base={"model": str(shared("configs") / "qwen2.5-0.5b"), "compute_dtype": "auto"})
    (tiny / "untokenised.yaml").write_text(dump_spec(spec))
    assert main(["plan", str(tiny / "untokenised.yaml")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Every row has data.max_length = 32 tokens" in printed
    assert "there is no tokenizer of" in printed


def test_rule_of_thumb_is_called_one(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unwilling(*args: Any) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    (tiny / "ruled.yaml").write_text(dump_spec(make_spec(tiny)))
    assert main(["plan", str(tiny / "ruled.yaml")]) == 0
    assert "rule of thumb" not in capsys.readouterr().out
    monkeypatch.setattr("torch.nn.Embedding.forward", unwilling)
    assert main(["plan", str(tiny / "ruled.yaml")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "a rule of thumb, for the code of LlamaForCausalLM does not" in printed
    assert "may be 0.2 to 4.5 times what stands here" in printed


def test_plan_as_json_is_one_document(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tiny / "plan.yaml").write_text(dump_spec(make_spec(tiny)))
    assert main(["plan", str(tiny / "plan.yaml"), "--set", "search.trials=3", "--json"]) == 0
    document: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert document["sweep"]["schedule"]["trials"] == 3
    assert document["corners"][0]["bytes"]["trainable"] > 0
    assert document["bases"][0]["weights"]["packed"] > 0


def test_plan_refuses_what_run_refuses(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(
        tiny, search={"space": {"rank": 4}}, training={"batch_size": 1}, hosts={"count": 1, "gpus_per_host": 0}
    )
    # Where lanes make a difference, and have a pass each.
    monkeypatch.setattr("lora_search.memory.estimate.KEPT_DENSE_BYTES", 0)
    monkeypatch.setattr("lora_search.memory.estimate.EVALUATION_TOKENS", {"cpu": 160, "cuda": 32_768})
    place = HostPlace("host-0", "here", cpus=2, gpus=0)
    _, data = prepare(spec, place)
    alone, beside = (capacity.memory_of(spec, place, lanes, data) for lanes in (1, 2))
    longest = capacity._rows(data)
    least, more = (memory.host([corners(spec, memory.tree, longest)[-1].shape]).total for memory in (alone, beside))
    assert least < more
    for usable in (least - 1, least, more):
        for room in ("plan.devices", "sweep.capacity"):
            monkeypatch.setattr(f"lora_search.{room}.usable_bytes", lambda device, hosts, trials, usable=usable: usable)
        said = None
        try:
            prepare(spec, place)
        except InputError as error:
            said = str(error)
        assert (said is None) == (usable >= least)
        refused = plan_sweep(spec).refused
        assert (refused and refused.replace(this_machine("auto", place, 1).name, "a host")) == said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["search.space.target_modules=[nowhere]"], "nowhere"),
        (["data.max_length=2"], "data.max_length"),
    ],
)
def test_wrong_input_is_told_once(
    tiny: Path, settings: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny / "wrong.yaml").write_text(dump_spec(make_spec(tiny)))
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert main(["plan", str(tiny / "wrong.yaml"), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("rows", "damage", "said"),
    [
        ({"text": "the cat"}, "remove", "column 'prompt', which .* does not have; it has text"),
        ({"prompt": "the cat", "completion": None}, "remove", "row 0 of .* 'completion'"),
        ({"prompt": "the cat", "completion": "sees"}, "spoil", "tokenizer"),
    ],
    ids=["no column", "no text", "broken tokenizer"],
)
def test_plan_refuses_rows_that_run_refuses(
    tiny: Path, tmp_path: Path, rows: dict[str, Any], damage: str, said: str
) -> None:
    """Without a tokenizer the lengths are assumed, but the data is looked at; one that is broken is told of."""
    model = shutil.copytree(tiny / "model", tmp_path / "model")
    for file in model.glob("token*"):
        if damage == "remove":
            file.unlink()
        else:
            file.write_text("{")
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows) + "\n")
    with pytest.raises(InputError, match=said):
        row_facts(make_spec(tiny, base={"model": str(model)}, data={"path": str(tmp_path / "rows.jsonl")}))


def test_rows_of_a_base_without_a_tokenizer_are_assumed(tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny / "model", tmp_path / "model", ignore=shutil.ignore_patterns("token*"))
    facts = row_facts(make_spec(tiny, base={"model": str(model)}))
    assert (facts.measured, facts.longest) == (False, 32)
    assert "no tokenizer" in facts.reason


def test_reports_are_counted_as_a_trial_makes_them(tiny: Path) -> None:
    scheduler = {"first_rung": 10, "reduction_factor": 3}
    spec = make_spec(tiny, training={"steps": 100, "eval_every": 25}, search={"scheduler": scheduler})
    made = report_steps(spec, trial_config(spec, {}))
    for stopped in (*rungs(spec), 100):
        assert report_count(spec, stopped) == sum(step <= stopped for step in made)


def test_doctor_says_where_packs_have_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_search import doctor
    from lora_search.engine import fused

    gpu = SimpleNamespace(name="NVIDIA L4")
    for name, answer in {
        "is_available": True,
        "device_count": 1,
        "get_device_properties": gpu,
        "mem_get_info": (23 << 30, 24 << 30),
        "get_device_capability": (8, 9),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, answer=answer: answer)
    for runs in (True, False):
        monkeypatch.setattr(fused, "fuses", lambda device, dtype, runs=runs: runs)
        found = list(doctor._devices())
        assert found[0] == doctor.Check("GPU 0", "ok", "NVIDIA L4, 23.0 of 24.0 GiB free, bfloat16")
        assert [check.state for check in found[1:]] == ([] if runs else ["note"])


def test_gpu_that_torch_does_not_see_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_search import doctor
    from lora_search.versions import versions

    def looked() -> doctor.Check:
        said = {"host": "there", "versions": versions(), "time": time.time(), "output": "runs", "storage": None}
        return doctor._node(Node("1234567890", 8, 1), said | {"gpus": []}, time.time())

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    place = HostPlace("host-0", "here", cpus=2, gpus=1)
    assert [device.type for device in capacity.devices_of(place)] == ["cpu"]  # the tests' own clusters have such GPUs
    assert looked().state == "ok"
    monkeypatch.delenv("LORA_SEARCH_LOGICAL_GPUS")
    with pytest.raises(InputError, match=r"^host-0 on .*: Ray says that it has 1 GPU, and torch sees none: "):
        capacity.devices_of(place)
    assert looked().state == "wrong"
    assert "Ray says that it has 1 GPU, and torch sees none" in looked().found
    assert [device.type for device in capacity.devices_of(replace(place, gpus=0))] == ["cpu"]
