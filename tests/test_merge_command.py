"""`lora-search merge`: what it takes, what it says, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_spec
from trained_run import train_run

from lora_search.cli import main
from lora_search.cli.trials import chosen_trials
from lora_search.results import run_rows
from lora_search.rundir import RunDirectory
from lora_search.spec import load_spec

pytestmark = pytest.mark.usefixtures("kept_verifier")

TRIALS: list[dict[str, Any]] = [
    {"rank": 8, "learning_rate": 3e-2, "steps": 20},
    {"rank": 8, "learning_rate": 2e-2, "steps": 20},
    {"rank": 4, "learning_rate": 2e-2, "steps": 20, "use_rslora": True},
    {"rank": 8, "learning_rate": 2e-3, "steps": 20},
    {"rank": 8, "learning_rate": 2e-3, "steps": 20},
]


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run directory of five trained trials, four of them of one rank, two hardly trained at all."""
    spec = make_spec(tiny, name="trained")
    trials = [({"dropout": 0.0, "target_modules": "all-linear"} | sampled, 20) for sampled in TRIALS]
    return train_run(spec, tmp_path_factory.mktemp("run"), trials, every=20, seconds=1000.0)


def merge(run: RunDirectory, out: Path, *arguments: str) -> int:
    return main(["merge", str(run.path), "--out", str(out), *arguments])


def test_merge_tells_of_both_ways_the_logits_and_the_texts(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(run, tmp_path / "merged", "--trial", "1") == 0
    said = capsys.readouterr()
    assert "trial 1 merged onto the" in said.out
    assert "original " in said.out
    assert "dequantized " in said.out
    assert "held-out tokens" in said.out
    assert said.out.count("  prompt ") == said.out.count("  merged ") == 3
    assert "verifying" in said.err
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "| adapter on its own base |" in card
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "merged").iterdir()
    }
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["use_cache"] is True


def test_merge_as_json_is_one_document(run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge(run, tmp_path / "merged", "--json", "--onto", "dequantized") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["onto"] == "dequantized"
    assert list(document["losses"]) == ["dequantized"]
    assert document["loss"] == pytest.approx(document["adapter_loss"], rel=1e-5)
    assert document["check"]["same_weights"]["largest"] < 1e-4
    assert document["check"]["same_weights"] == document["check"]["as_trained"]
    assert all(text["adapter"] == text["merged"] for text in document["check"]["texts"])
    assert document["in_memory"] is None


def test_original_weights_are_compared_with_both_bases(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(run, tmp_path / "merged", "--json", "--onto", "original", "--tolerance", "1")
    check = json.loads(capsys.readouterr().out)["check"]
    assert check["same_weights"]["largest"] < 1e-4  # the merge itself
    assert check["as_trained"]["mean"] > 10 * check["same_weights"]["mean"]  # what NF4 has made of the base


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_that_of_the_file_and_of_what_transformers_loads(
    dtype: str, run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    assert merge(run, tmp_path / "merged", "--dtype", dtype, "--json", "--onto", "dequantized") == 0
    relative = json.loads(capsys.readouterr().out)["check"]["same_weights"]
    assert 0 < relative["mean"] / relative["spread"] < 0.02
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_unverified_merge_says_so_and_is_the_verified_one(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(run, tmp_path / "seen", "--onto", "original", "--tolerance", "1") == 0
    capsys.readouterr()
    assert merge(run, tmp_path / "unseen", "--onto", "original", "--no-verify") == 0
    said = capsys.readouterr()
    assert "WARNING: --no-verify" in said.err
    assert "NOT verified" in said.out
    assert "**Not verified**" in (tmp_path / "unseen" / "README.md").read_text()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("seen", "unseen")]
    assert weights[0] == weights[1]


def test_drift_beyond_the_tolerance_warns_keeps_the_model_and_exits_1(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(run, tmp_path / "merged", "--onto", "original", "--tolerance", "1e-9") == 1
    assert "WARNING" in capsys.readouterr().err
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-verify"], "--onto auto measures both ways"),
        (["--tolerance", "-1"], "--tolerance -1"),
        (["--weights", "1,1"], "name them with --trials"),
        (["--trials", "1"], "at least two"),
        (["--trials", "1,1"], "each once"),
        (["--trials", "1,7"], "no such trial"),
        (["--trials", "top9"], "only 5 trials"),
        (["--trials", "some"], "topK"),
        (["--trials", "0,1", "--weights", "1"], "found 1, for 2 trials"),
        (["--trials", "0,1", "--weights", "a,b"], "must be numbers"),
        (["--trials", "0,1", "--combine", "slerp"], "allowed: linear"),
        (["--trials", "0,2", "--combine", "ties"], "needs adapters of one rank; found 8 of trial 0, 4 of trial 2"),
        (["--trials", "0,1", "--density", "2"], "at most 1"),
        (["--trials", "0,1", "--no-verify", "--onto", "original"], "--no-verify measures nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_exit_2_and_leave_nothing(
    arguments: list[str], said: str, run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(run, tmp_path / "merged", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_several_trials_are_merged_together_or_the_best_alone(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(run, tmp_path / "merged", "--trials", "0,1", "--json", "--onto", "dequantized")
    document = json.loads(capsys.readouterr().out)
    losses = document["together"]["losses"]
    assert set(losses) == {
        *(f"trial {number}" for number in document["trials"]),
        *("cat", "linear", "ties", "dare_linear"),
    }
    assert losses[document["together"]["kept"]] == min(losses.values())
    assert document["together"]["combined"] == (not document["together"]["kept"].startswith("trial "))
    assert document["loss"] == pytest.approx(min(losses.values()), rel=1e-4)


def test_all_of_the_weight_on_one_trial_is_that_trial_whatever_its_scaling(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--trials", "2,0", "--weights", "1,0", "--combine", "cat,svd", "--json"]
    merge(run, tmp_path / "merged", *arguments)
    losses = json.loads(capsys.readouterr().out)["together"]["losses"]
    assert losses["cat"] == pytest.approx(losses["trial 2"], rel=1e-5)
    assert losses["svd"] == pytest.approx(losses["trial 2"], rel=1e-4)


def test_combination_that_helps_is_kept_and_merged(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two adapters that have hardly begun: their sum has gone twice as far."""
    arguments = ["--trials", "3,4", "--weights", "1,1", "--combine", "cat", "--onto", "dequantized"]
    assert merge(run, tmp_path / "merged", *arguments) == 0
    said = capsys.readouterr().out
    assert "cat is better than each trial alone; it is merged" in said
    assert "trials 3, 4 merged onto the dequantized weights" in said


def test_combination_that_does_not_help_leaves_the_best_alone(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--trials", "3,0", "--weights", "1,0", "--combine", "svd", "--json", "--onto", "dequantized"]
    assert merge(run, tmp_path / "merged", *arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["together"]["kept"] == "trial 0"
    assert document["together"]["combined"] is False
    assert document["loss"] == pytest.approx(document["together"]["losses"]["trial 0"], rel=1e-5)


def test_best_trials_are_named_best_first(run: RunDirectory) -> None:
    rows = run_rows(run)
    spec = load_spec(run.spec)
    ranked = sorted(rows, key=lambda row: row["eval_loss"])
    assert chosen_trials(run, spec, rows, "top3") == ranked[:3]
    assert [row["trial"] for row in chosen_trials(run, spec, rows, "1, 0,1")] == [1, 0]
    assert chosen_trials(run, spec, rows, "0,best")[-1] == ranked[0]


SLOW = """
import sys, time
from lora_search.merge import published
write = published.write_shard
import lora_search.merge.shards as shards
def slowly(*arguments):
    write(*arguments)
    print("half", file=sys.__stdout__, flush=True)
    time.sleep(600)
shards.write_shard = slowly
from lora_search.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_killed_merge_leaves_no_half_model_and_the_next_one_succeeds(run: RunDirectory, tmp_path: Path) -> None:
    """SIGKILL after the weights have been written, and before the folder is complete."""
    out = tmp_path / "merged"
    command = [sys.executable, "-c", SLOW, "merge", str(run.path), "--out", str(out), "--onto", "original"]
    killed = subprocess.Popen([*command, "--no-verify"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "half\n"
    assert merge(run, out, "--onto", "original", "--no-verify") == 1  # another process is at it
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = tmp_path / ".merged.merging" / "original" / "model.safetensors"
    assert left.is_file()
    assert not out.exists()
    assert merge(run, out, "--onto", "dequantized") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_verifying_process_that_dies_is_told_and_nothing_is_kept(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_search.merge import verify

    started = verify.FreshProcess.ask

    def ask(self: Any, *arguments: Any) -> Any:
        os.kill(self._process.pid, signal.SIGKILL)
        time.sleep(0.1)
        return started(self, *arguments)

    monkeypatch.setattr(verify.FreshProcess, "ask", ask)
    assert merge(run, tmp_path / "merged") == 1
    assert "ended with status -9" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
