"""What a report says of a run: one's own or somebody else's, whole, empty, running or broken off."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from searched_run import CONCLUSION, SWEEP, write_searched

from lora_search import open_run
from lora_search.cli import main
from lora_search.report import document, page
from lora_search.report.advice import advice
from lora_search.report.front import front
from lora_search.report.importance import importance
from lora_search.report.occupancy import UNKNOWN, occupancy, stays
from lora_search.report.page import LIBRARY
from lora_search.report.parameters import parameters
from lora_search.report.progress import MOST_POINTS, curves, progress, thinned
from lora_search.report.savings import savings
from lora_search.report.standing import standing
from lora_search.spec import SweepSpec, parse_spec


def row(trial: int, state: str, steps: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"trial": trial, "state": state, "steps": steps, "steps_total": 90, "eval_loss": loss, **more}


ROWS = [
    row(0, "completed", 90, 1.0, seconds=90.0, trainable_parameters=400),
    row(1, "stopped", 10, 0.9, seconds=20.0, trainable_parameters=100),
    row(2, "stopped", 30, 2.0, seconds=30.0, trainable_parameters=300),
    row(3, "failed", 10, 0.1, seconds=1.0, trainable_parameters=1),
    row(4, "running", 10, 0.2, seconds=1.0, trainable_parameters=1),
    row(5, "completed", 90, 0.5, seconds=90.0, trainable_parameters=800),
    row(6, "completed", 90, 0.7, seconds=90.0, trainable_parameters=800),
]


def test_trial_that_went_further_stands_before_one_with_a_better_value_at_an_earlier_step() -> None:
    assert [row["trial"] for row in standing(ROWS, "eval_loss", "min")] == [5, 6, 0, 2, 1]
    assert [row["trial"] for row in standing(ROWS, "eval_loss", "max")] == [0, 6, 5, 2, 1]


def test_savings_are_the_steps_and_seconds_that_stopped_trials_did_not_take() -> None:
    found = savings(ROWS)
    assert (found["stopped"], found["ended"]) == (2, 5)
    assert (found["spared"], found["done"]) == (80 + 60, 3 * 90 + 10 + 30)
    assert found["seconds"] == pytest.approx(80 * 2.0 + 60 * 1.0)
    assert found["rungs"] == [
        {"step": 10, "went_on": 4, "stopped": 1},
        {"step": 30, "went_on": 3, "stopped": 1},
    ]


def test_front_holds_the_trials_that_none_beats_in_size_and_quality() -> None:
    assert front(ROWS, "trainable_parameters", "eval_loss", "min") == [1, 5]
    assert front(ROWS, "trainable_parameters", "eval_loss", "max") == [1, 2]
    assert front(ROWS, "trial_memory_bytes", "eval_loss", "min") == []


def event(kind: str, trial: int, time: float, **more: Any) -> dict[str, Any]:
    return {"event": kind, "trial": trial, "time": time, **more}


LOST = [
    event("start", 0, 100.0, parameters={}),
    event("start", 1, 100.0, parameters={}),
    event("report", 0, 110.0, step=10, tokens=100, seconds=8.0, eval_loss=3.0, host="a"),
    event("report", 0, 120.0, step=20, tokens=200, seconds=16.0, eval_loss=2.0, host="a"),
    event("report", 1, 120.0, step=10, tokens=100, seconds=18.0, eval_loss=2.5, host="b"),
    event("end", 1, 121.0, state="stopped", reason=None),
    event("resume", 0, 150.0, step=10, damaged=["checkpoint_000020"]),
    event("report", 0, 160.0, step=20, tokens=200, seconds=16.0, eval_loss=2.0, host="b"),
    event("report", 0, 170.0, step=30, tokens=300, seconds=24.0, eval_loss=1.0, host="b"),
]


def test_what_a_trial_repeats_after_a_loss_is_spent_twice() -> None:
    found = progress(LOST, "eval_loss", "min")
    assert found["end"] == [70.0, 500.0, 50.0, 18.0 + 32.0]
    assert [(point[0], point[4], point[5]) for point in found["best"]] == [
        (10.0, 3.0, 0),
        (20.0, 2.0, 0),
        (70.0, 1.0, 0),
    ]
    assert curves(LOST, "eval_loss") == {0: [(10, 3.0), (20, 2.0), (30, 1.0)], 1: [(10, 2.5)]}


def test_lost_trial_leaves_its_host_when_it_was_last_heard_of() -> None:
    found = [(stay.trial, stay.host, stay.begin, stay.end) for stay in stays(LOST, now=180.0)]
    assert found == [(1, "b", 100.0, 121.0), (0, "a", 100.0, 120.0), (0, "b", 150.0, 180.0)]
    assert stays(LOST, now=None)[-1].end == 170.0
    assert stays([*LOST[:2], event("checkpoint", 0, 105.0)], now=None)[0].host == UNKNOWN


def test_occupancy_is_trial_seconds_over_time() -> None:
    found = occupancy(stays(LOST, now=180.0), {"a": 2.0, "b": 2.0})
    assert found["mean"] == pytest.approx((21 + 20 + 30) / 80)
    assert found["capacity"] == 4
    a, b = found["hosts"]
    width = found["times"][1] - found["times"][0]
    assert sum(a["resident"]) * width == pytest.approx(20, rel=0.01)
    assert sum(b["resident"]) * width == pytest.approx(51, rel=0.01)
    assert max(a["resident"]) == 1


def test_long_curve_is_thinned_and_keeps_its_ends() -> None:
    curve = [(step, 1 / step) for step in range(1, 1001)]
    kept = thinned(curve)
    assert len(kept) == MOST_POINTS
    assert (tuple(kept[0]), tuple(kept[-1])) == (curve[0], curve[-1])


def test_importance_names_what_decides_and_what_is_chance(tmp_path: Path) -> None:
    run = open_run(write_searched(tmp_path / "run", 120))
    placed = standing(run.rows, "eval_loss", "min")
    found = importance(placed, parameters(run.spec, run.rows))
    assert [entry["name"] for entry in found[:2]] == ["learning_rate", "target_modules"]
    assert sum(entry["share"] for entry in found) == pytest.approx(1)
    assert found == importance(placed, parameters(run.spec, run.rows))
    by_name = {entry["name"]: entry for entry in found}
    assert by_name["learning_rate"]["chance"] <= 0.05 < by_name["dropout"]["chance"]
    assert all(0 <= entry["low"] <= entry["high"] <= 1 for entry in found)
    assert importance(placed[:9], parameters(run.spec, run.rows)) == []


def spec() -> SweepSpec:
    return parse_spec(yaml.safe_dump(SWEEP), source="sweep.yaml", folder=Path())


@pytest.mark.parametrize(
    ("ranks", "last", "said"),
    [
        ((64, 64, 64), 0.5, ["rank at the top", "more than an adapter of that size learns", "still improving at"]),
        ((64, 64, 64), 0.999, ["a larger one may be better"]),
        ((4, 4, 4), 0.999, ["rank at the bottom"]),
        ((64, 32, 64), 0.999, []),
    ],
)
def test_user_whose_best_trials_sit_at_an_end_of_the_range_is_told_so(
    ranks: tuple[int, ...], last: float, said: list[str]
) -> None:
    best = [
        row(i, "completed", 90, last, rank=rank, alpha_ratio=2, dropout=0.0, learning_rate=10 ** (-2.5 - i / 4))
        for i, rank in enumerate(ranks)
    ]
    lines = {i: [(30, 2.0), (80, 1.0), (90, last)] for i in range(3)}
    found = " ".join(advice(spec(), best, lines, spec().search.trials))
    assert all(words in found for words in said)
    assert bool(found) == bool(said)


def test_report_says_what_was_found(tmp_path: Path) -> None:
    run = open_run(write_searched(tmp_path / "run", 30))
    assert run.best is not None
    (tmp_path / "run" / "provenance.json").write_text(
        json.dumps({"conclusion": CONCLUSION | {"trial": int(run.best["trial"])}})
    )
    told = document(open_run(tmp_path / "run"))
    assert told["state"] == "finished"
    line = told["headline"]
    assert line.startswith(f"Trial {run.best['trial']} is the best of 30: validation loss {run.best['eval_loss']:.4f}")
    assert "untrained base has 5.9000" in line
    assert "0.8060 (95 % interval 0.7512 to 0.8633), untrained 6.0617" in line
    assert told["findings"]["savings"].startswith("ASHA stopped")


def test_report_of_an_unfinished_sweep_tells_a_trial_that_is_ahead_of_the_best(tmp_path: Path) -> None:
    folder = write_searched(tmp_path / "run", 30)
    best = open_run(folder).best
    assert best is not None
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    lines = [line for line in lines if not (line["event"] == "end" and line["trial"] == best["trial"])]
    (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    second = open_run(folder).best
    assert second is not None
    assert second["trial"] != best["trial"]
    line = document(open_run(folder))["headline"]
    assert line.startswith(f"Trial {second['trial']} is the best of 29: validation loss {second['eval_loss']:.4f}")
    assert line.endswith(f" so far; trial {best['trial']}, not at its end, has {best['eval_loss']:.4f}.")


@pytest.mark.parametrize("conclusion", [3, {"trial": "x", "test_loss": "<b>", "test_loss_interval": [1]}, {}])
def test_conclusion_of_somebody_else_is_read_as_far_as_it_can(tmp_path: Path, conclusion: Any) -> None:
    folder = write_searched(tmp_path / "run", 3)
    (folder / "provenance.json").write_text(json.dumps({"conclusion": conclusion, "hosts": {"a": 1}}))
    assert "is the best of 3" in document(open_run(folder))["headline"]


def stub(folder: Path, events: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    (folder / "trials.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


FAILED = [LOST[0], event("end", 0, 101.0, state="failed", reason="out of memory")]
EDGES = {"no trials": [], "one trial begun": LOST[:1], "one report": LOST[:1] + LOST[2:3], "all failed": FAILED}
HUGE = [
    event("start", 0, 2.0**33 - 1, parameters={"rank": 2**62, "dropout": 1e308}),
    event("start", 1, 0.0, parameters={"rank": "x", "target_modules": ["a", "b"], "learning_rate": -1}),
    event("report", 0, 0.0, step=2**62, steps_total=2**62, eval_loss=1e308, tokens=2**62, host="h"),
    event("report", 1, 0.0, step=0, eval_loss=-1e308, seconds=-1.0),
    event("end", 1, 0.0, state="stopped", reason=None),
    event("end", 0, 0.0, state="completed", reason=None),
]


@pytest.mark.parametrize("events", [*EDGES.values(), HUGE], ids=[*EDGES, "numbers out of all bounds"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_run_of_whatever_kind_has_a_report(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    folder = stub(tmp_path / "run", events)
    assert "</html>" in page(document(open_run(folder)))
    (folder / "trials.jsonl").unlink()
    assert document(open_run(folder))["headline"] == "No trial has begun yet."


def test_report_of_500_trials_is_small_and_quickly_made(tmp_path: Path) -> None:
    run = open_run(write_searched(tmp_path / "run", 500, points=10))
    began = time.monotonic()
    html = page(document(run))
    assert time.monotonic() - began < 10  # 0.7 s on an idle machine
    assert len(html.encode()) < 5_000_000


def test_nothing_of_a_run_is_read_as_html(tmp_path: Path) -> None:
    folder = stub(tmp_path / "run", [LOST[0], event("end", 0, 101.0, state="failed", reason="</script><b>\u2028&")])
    html = page(document(open_run(folder)))
    assert "</script><b>" not in html
    assert html.count("</script>") == 3
    block = re.search(r'<script type="application/json" id="document">(.*?)</script>', html, re.DOTALL)
    assert block is not None
    assert not set(block[1]) & set("<>&\u2028")
    assert json.loads(block[1])["trials"][0]["reason"] == "</script><b>\u2028&"


def test_page_fetches_nothing_and_lets_only_its_own_scripts_run(tmp_path: Path) -> None:
    html = page(document(open_run(stub(tmp_path / "run", []))))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[1]
    assert not re.search(r"<(link|img|iframe|script[^>]* src)", html.replace(LIBRARY.read_text(), ""))


def test_vendored_library_is_the_one_that_its_page_names() -> None:
    digest = hashlib.sha256(LIBRARY.read_bytes()).hexdigest()
    assert digest in (LIBRARY.parent / "README.md").read_text()


def test_command_writes_into_the_run_directory_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_searched(tmp_path / "run", 3)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/report.html\n"
    assert (folder / "report.html").stat().st_size > 1_000_000
    assert main(["report", str(folder), "--out", str(tmp_path / "else.html")]) == 0
    assert (tmp_path / "else.html").is_file()
    assert main(["report", str(folder), "--out", str(tmp_path / "no" / "where.html")]) == 2
    assert "--out: " in capsys.readouterr().err


def test_report_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    folder = write_searched(tmp_path / "run", 12)
    script = (
        "import sys; from lora_search.cli import main; status = main(['report', sys.argv[1]]);"
        "print([name for name in ('ray', 'torch', 'transformers', 'wandb') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "[]"


def test_searched_steps_are_shown_as_planned_not_as_done(tmp_path: Path) -> None:
    folder = write_searched(tmp_path / "run", 12)
    sweep = yaml.safe_load((folder / "sweep.yaml").read_text())
    sweep["search"]["space"]["steps"] = {"choice": [90, 180]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    events = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    for event in events:
        planned = 90 * (1 + event["trial"] % 2)
        event |= {"steps_total": planned} if event["event"] == "report" else {}
        event |= {"parameters": event["parameters"] | {"steps": planned}} if event["event"] == "start" else {}
    (folder / "trials.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    found = document(open_run(folder))
    (axis,) = (parameter for parameter in found["parameters"] if parameter["name"] == "steps_total")
    assert axis["categories"] == ["90", "180"]
    assert [trial["parameters"]["steps_total"] for trial in found["trials"]] == [90, 180] * 6
    assert "steps_total" in {entry["name"] for entry in found["importance"]}
    assert "planned steps" in dict(found["best"]["settings"])
