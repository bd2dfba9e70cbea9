"""Weights & Biases: a run a trial, read back from disk with wandb's own messages."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from bad_wandb import FAULTS, KEY, SLOW, bad_wandb
from conftest import PATIENCE
from test_faults import TRIALS, command, compared, require_whole, sequential, without_faults
from wandb.proto.wandb_internal_pb2 import Record

from lora_search.results import run_rows
from lora_search.rundir import RunDirectory
from lora_search.spec import Wandb
from lora_search.tracking import wandb as tracking
from lora_search.tracking.wandb import WandbRuns, wandb_mode

OFFLINE = Wandb(project="test", mode="offline")


def report(step: int, loss: float) -> dict[str, Any]:
    history = [{"step": s, "loss": loss + 0.1, "grad_norm": 1.0, "lr": 1e-3, "tokens": 50} for s in (step - 1, step)]
    return {
        "step": step,
        "steps_total": 8,
        "eval_loss": loss,
        "perplexity": 2.0,
        "token_accuracy": 0.5,
        "train_loss": loss + 0.1,
        "tokens": 50 * step,
        "tokens_per_second": 10.0,
        "seconds": 1.0,
        "peak_memory_bytes": 1 << 20,
        "history": history,
    }


def records(file: Path) -> Iterator[Record]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, records in pieces) behind 7 bytes."""
    content = file.read_bytes()
    assert b":W&B".startswith(content[:4])
    position, pieces = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if position + 7 + length > len(content):  # it is being written
            return
        pieces += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(pieces)
            yield record
            pieces = b""


def item_key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def read_runs(folder: Path, count: int) -> dict[str, dict[str, Any]]:
    """What W&B would upload of each run, by the run's name; waits until its service has written `count` whole runs."""
    deadline = time.monotonic() + 30
    while len(runs := read_written(folder)) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    return runs


def read_written(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs that are on disk to their end."""
    runs = {}
    for file in folder.glob("wandb/offline-run-*/*.wandb"):
        run: dict[str, Any] = {"history": [], "summary": {}, "artifacts": []}
        for record in records(file):
            if record.HasField("run") and record.run.display_name:
                run |= {"name": record.run.display_name, "group": record.run.run_group, "kind": record.run.job_type}
                run["config"] = {item_key(item): json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                row = {item_key(item): json.loads(item.value_json) for item in record.history.item}
                run["history"].append(row)
            elif record.HasField("summary"):
                run["summary"] |= {item_key(i): json.loads(i.value_json) for i in record.summary.update}
            elif record.HasField("exit"):
                run["exit"] = record.exit.exit_code
            elif record.HasField("request") and record.request.HasField("log_artifact"):
                run["artifacts"].append(record.request.log_artifact.artifact)
            elif record.HasField("artifact"):
                run["artifacts"].append(record.artifact)
        if "exit" in run:
            runs[run["name"]] = run
    return runs


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, dict[str, Any]]]:
    """A sweep of three trials, recorded offline and read back."""
    folder = tmp_path_factory.mktemp("run")
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    said: list[str] = []
    runs = WandbRuns(OFFLINE, "demo", folder, {"name": "demo"}, said.append)
    for trial in range(3):
        runs.trial_started(trial, {"rank": 4 * (trial + 1), "target_modules": ["q_proj", "v_proj"]})
    for step in (2, 4):
        for trial in range(3):
            runs.trial_reported(trial, report(step, 3.0 - step / 10 - trial))
    runs.trial_ended(0, "stopped", None)
    runs.trial_ended(1, "failed", "loss is nan at step 5")
    runs.trial_ended(2, "completed", None)
    rows = [{"trial": t, "state": "completed", "rank": 4, "target_modules": ["q_proj"], "reason": None} for t in (0, 2)]
    runs.concluded(rows, {"trial": 2, "eval_loss": 0.6}, adapter)
    runs.close()
    return folder, said, read_runs(folder, 4)


def test_every_trial_is_a_run_of_the_sweeps_group(written: Any) -> None:
    _, _, runs = written
    assert sorted(runs) == ["demo-0", "demo-1", "demo-2", "demo-summary"]
    assert {run["group"] for run in runs.values()} == {"demo"}
    assert {run["kind"] for name, run in runs.items() if name != "demo-summary"} == {"trial"}
    assert runs["demo-1"]["config"]["rank"] == 8
    assert runs["demo-1"]["config"]["target_modules"] == ["q_proj", "v_proj"]


def test_step_and_report_metrics_stand_at_their_steps(written: Any) -> None:
    _, _, runs = written
    history = runs["demo-2"]["history"]
    steps = {row["step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert steps == pytest.approx({1: 0.9, 2: 0.9, 3: 0.7, 4: 0.7})
    reports = {row["step"]: row["eval/loss"] for row in history if "eval/loss" in row}
    assert reports == pytest.approx({2: 0.8, 4: 0.6})


def test_state_and_reason_are_in_the_summary(written: Any) -> None:
    _, _, runs = written
    states = {name: (run["summary"].get("state"), run["exit"]) for name, run in runs.items() if name != "demo-summary"}
    assert states == {"demo-0": ("stopped", 0), "demo-1": ("failed", 1), "demo-2": ("completed", 0)}
    assert runs["demo-1"]["summary"]["reason"] == "loss is nan at step 5"


def test_summary_run_has_the_table_and_the_best_adapter(written: Any) -> None:
    _, _, runs = written
    summary = runs["demo-summary"]
    table = next(row for row in summary["history"] if "trials._type" in row)
    assert (table["trials._type"], table["trials.nrows"], table["trials.ncols"]) == ("table-file", 2, 5)
    assert summary["summary"]["best/eval_loss"] == 0.6
    assert summary["config"]["name"] == "demo"
    assert "demo-best-adapter" in [artifact.name for artifact in summary["artifacts"]]


def test_user_is_told_once_how_to_upload(written: Any) -> None:
    folder, said, _ = written
    assert said == [f"W&B runs are offline; upload them with: wandb sync {folder}/wandb/offline-run-*"]


def test_trial_that_is_given_up_before_it_went_on_costs_no_other_its_record(tmp_path: Path) -> None:
    """It began in an earlier process: in this one, its end is the first that is told of it."""
    said: list[str] = []
    runs = WandbRuns(OFFLINE, "demo", tmp_path, {"name": "demo"}, said.append)
    runs.trial_ended(3, "failed", "given up after 3 retries: ActorDiedError: gone")
    runs.trial_started(4, {"rank": 4})
    runs.trial_ended(4, "completed", None)
    runs.close()
    found = read_runs(tmp_path, 2)
    assert {name: run["summary"]["state"] for name, run in found.items()} == {"demo-3": "failed", "demo-4": "completed"}
    assert len(said) == 1


def test_failing_wandb_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def broken(**_: Any) -> None:
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", broken)
    said: list[str] = []
    runs = WandbRuns(OFFLINE, "demo", tmp_path, {}, said.append)
    for trial in range(5):
        runs.trial_started(trial, {})
        runs.trial_reported(trial, report(2, 1.0))
        runs.trial_ended(trial, "completed", None)
    runs.concluded([], {}, tmp_path)
    runs.close()
    assert said == ["W&B failed and is left out from here on: CommError: no route to host"]


def test_slow_wandb_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: time.sleep(30))
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT_S", 0.2)
    said: list[str] = []
    runs = WandbRuns(OFFLINE, "demo", tmp_path, {}, said.append)
    start = time.monotonic()
    for trial in range(100):
        runs.trial_started(trial, {})
        runs.trial_reported(trial, report(2, 1.0))
    assert time.monotonic() - start < 10
    runs.close()
    assert len(said) == 1
    assert "still busy" in said[0]


MISBEHAVING = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_wandb import report
from lora_search.spec import Wandb
from lora_search.tracking import wandb as tracking

tracking.ANSWER_S = 3
runs = tracking.WandbRuns(Wandb(project="test", mode="online"), "demo", Path(sys.argv[1]), {}, print)
longest = 0.0
for trial in range(400):
    for call in (
        lambda: runs.trial_started(trial, {"rank": 4}),
        lambda: runs.trial_reported(trial, report(2, 1.0)),
        lambda: runs.trial_ended(trial, "completed", None),
    ):
        start = time.perf_counter()
        call()
        longest = max(longest, time.perf_counter() - start)
start = time.perf_counter()
runs.close()
print("longest call", longest)
print("close", time.perf_counter() - start)
"""


@pytest.fixture(scope="module")
def misbehaving(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str], str]]:
    """By how the server misbehaves: exit status, standard output and error of a process that told it of 400 trials."""
    answers = {}
    with ExitStack() as servers:
        started = {}
        for fault in FAULTS:
            started[fault] = subprocess.Popen(
                [sys.executable, "-c", MISBEHAVING, str(tmp_path_factory.mktemp("run")), str(Path(__file__).parent)],
                env=without_wandb() | servers.enter_context(bad_wandb(fault)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        for fault, process in started.items():
            said, errors = process.communicate(timeout=PATIENCE)
            answers[fault] = (process.returncode, said.splitlines(), errors)
    return answers


def without_wandb() -> dict[str, str]:
    """This process's environment, but for what W&B looks at."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}


@pytest.mark.parametrize("fault", FAULTS)
def test_server_that_misbehaves_costs_one_warning_and_no_time(misbehaving: Any, fault: str) -> None:
    status, said, errors = misbehaving[fault]
    assert status == 0, errors
    warning, longest, close = said
    assert warning.startswith("W&B failed and is left out from here on: CommError")
    # Of 1,200 calls; to wait for the server takes 5 seconds, on a quiet machine.
    assert float(longest.split()[-1]) < 2.5
    assert float(close.split()[-1]) < 50  # one run is waited for, and not 400
    assert not errors


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_sweep_comes_to_the_same_whatever_its_wandb_does(
    fault: str, tiny: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    wandb = {"wandb": {"project": "test", "mode": "online"}}
    spec = sequential(tiny, "recorded", tmp_path, tracking=wandb)
    with bad_wandb(fault) as environment:
        answer = subprocess.run(
            command(spec), env=without_wandb() | environment, capture_output=True, text=True, timeout=PATIENCE
        )
    assert answer.returncode == 0, answer.stderr
    (warning,) = [line for line in answer.stderr.splitlines() if "W&B" in line]
    error = "TimeoutError" if fault == "hangs after a while" else "CommError"  # a run's end, or its beginning
    assert warning.strip().startswith(f"W&B failed and is left out from here on: {error}")
    run = RunDirectory(tmp_path / "recorded")
    require_whole(run, TRIALS)
    assert compared(run_rows(run)) == without_faults(tiny, tmp_path_factory)
    written = [file.read_bytes() for file in run.path.rglob("*") if file.is_file()]
    assert not [text for text in (answer.stdout.encode(), answer.stderr.encode(), *written) if KEY.encode() in text]


@pytest.mark.slow
def test_sweep_is_recorded_by_a_slow_wandb(
    tiny: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It takes a second for every answer, and all are right."""
    wandb = {"wandb": {"project": "test", "mode": "online"}}
    spec = sequential(tiny, "recorded", tmp_path, tracking=wandb)
    asked: Counter[str] = Counter()
    with bad_wandb(SLOW, asked) as environment:
        answer = subprocess.run(
            command(spec), env=without_wandb() | environment, capture_output=True, text=True, timeout=PATIENCE
        )
    assert answer.returncode == 0, answer.stderr
    assert "W&B" not in answer.stderr
    assert asked["UpsertBucket"] >= TRIALS + 1  # a run each, and the summary
    run = RunDirectory(tmp_path / "recorded")
    require_whole(run, TRIALS)
    assert compared(run_rows(run)) == without_faults(tiny, tmp_path_factory)


@pytest.mark.parametrize(
    ("wanted", "environment", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k" * 40}, "online"),
        ("auto", {"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "disabled"}, "disabled"),
        ("offline", {"WANDB_API_KEY": "k" * 40}, "offline"),
        ("online", {"WANDB_MODE": "offline"}, "online"),
        ("disabled", {"WANDB_MODE": "online"}, "disabled"),
    ],
)
def test_mode_is_the_sweep_files_before_the_environments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: str, environment: dict[str, str], mode: str
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(wanted) == mode


def test_key_of_wandb_login_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode("auto") == "online"


def test_disabled_wandb_is_never_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lora_search.spec import Wandb;"
        "from lora_search.tracking.wandb import WandbRuns;"
        "runs = WandbRuns(Wandb(mode='disabled'), 'x', Path(sys.argv[1]), {}, print);"
        "runs.trial_started(0, {}); runs.trial_ended(0, 'completed', None); runs.close(); print('wandb' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"
    assert not list(tmp_path.iterdir())
