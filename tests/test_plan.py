"""The plan of a sweep: how many steps, on how many seats, and one document of it all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_spec, shared

from lora_search.cli import main
from lora_search.plan import plan_sweep
from lora_search.plan.devices import GPUS
from lora_search.plan.schedule import expected_lengths, fill, schedule
from lora_search.plan.work import base_work
from lora_search.spec import dump_spec
from lora_search.targets import module_tree, skeleton


def test_one_in_three_goes_on_at_each_rung() -> None:
    lengths = expected_lengths(24, [10, 30], 90, 3)
    assert lengths == [10] * 16 + [30] * 5 + [90] * 3


def test_nothing_is_stopped_without_a_scheduler() -> None:
    assert expected_lengths(4, [], 90, 3) == [90] * 4


def test_seats_are_filled_until_only_stragglers_are_left() -> None:
    assert fill([10, 10, 10, 10], seats=2) == (1.0, 0.0)
    filled, alone = fill([10, 10, 10, 90], seats=2)
    assert filled == pytest.approx(120 / 200)
    assert alone == pytest.approx(80 / 100)


def test_schedule_lies_between_its_bounds(tiny: Path) -> None:
    found = schedule(make_spec(tiny), seats=4)
    assert found.fewest <= found.expected <= found.most
    assert (found.trials, found.fewest, found.most) == (8, 16, 64)
    assert found.expected == sum([2] * 4 + [4] * 2 + [8] * 2)
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


def test_plan_goes_on_without_a_tokenizer_and_says_so(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = make_spec(tiny, base={"model": str(shared("configs") / "qwen2.5-0.5b"), "compute_dtype": "auto"})
    (tiny / "untokenised.yaml").write_text(dump_spec(spec))
    assert main(["plan", str(tiny / "untokenised.yaml")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Every row has data.max_length = 32 tokens" in printed
    assert "there is no tokenizer of" in printed


def test_plan_as_json_is_one_document(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tiny / "plan.yaml").write_text(dump_spec(make_spec(tiny)))
    assert main(["plan", str(tiny / "plan.yaml"), "--set", "search.trials=3", "--json"]) == 0
    document: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert document["sweep"]["schedule"]["trials"] == 3
    assert document["corners"][0]["bytes"]["trainable"] > 0
    assert document["bases"][0]["weights"]["packed"] > 0


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
