"""The command line: what a wrong input gets, how soon, and what the commands print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import PATIENCE, ROOT, make_spec, shared

from lora_search.cli import main
from lora_search.cli.results import sweep_status
from lora_search.errors import InputError
from lora_search.rundir import RunDirectory, create_run, locked, newest_run, write_whole
from lora_search.spec import dump_spec, parse_spec
from lora_search.sweep.provenance import provenance, read_provenance, write_provenance
from lora_search.tracking import RunRecord


def lora_search(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora_search", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {stepz: 3}\n", ["wrong.yaml:1: training.stepz", "'steps'", "allowed:"]),
        ("data: {path: nowhere.jsonl}\n", ["wrong.yaml:1: data.path", "nowhere.jsonl"]),
        ("search: {space: {rank: {choice: []}}}\n", ["wrong.yaml:1: search.space.rank", "empty"]),
    ],
)
def test_wrong_sweep_file_exits_2_before_anything_heavy_is_imported(tmp_path: Path, text: str, said: list[str]) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    code = (
        "import sys; from lora_search.cli import main; status = main(['run', sys.argv[1]]);"
        "heavy = ('torch', 'ray', 'transformers', 'optuna', 'pandas', 'wandb');"
        "print([name for name in heavy if name in sys.modules]);"
        "sys.exit(status)"
    )
    start = time.monotonic()
    answer = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert answer.returncode == 2
    assert answer.stdout == "[]\n"
    assert "Traceback" not in answer.stderr
    assert all(part in answer.stderr for part in said), answer.stderr
    assert time.monotonic() - start < 10  # 0.4 s on an idle machine; the promise is 2
    assert not (tmp_path / "runs").exists()


def test_hub_that_does_not_answer_is_said_once(tmp_path: Path) -> None:
    """It is asked again five times, with pauses, which are left out here."""
    code = (
        "import time; time.sleep = lambda seconds: None; from lora_search.cli import main;"
        "raise SystemExit(main(['targets', 'nobody/nothing']))"
    )
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | nowhere)
    waiting, refused = answer.stderr.splitlines()
    assert "thrown while requesting HEAD http://127.0.0.1:9/nobody/nothing/resolve/main/config.json" in waiting
    assert waiting.endswith("; asking again")
    assert refused.startswith("lora-search: model: cannot read a configuration from 'nobody/nothing': ")
    assert answer.returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "nowhere.yaml"],
        ["run"],
        ["status", "nowhere"],
        ["results", "nowhere"],
        ["results", "nowhere", "--format", "xml"],
        ["merge", "nowhere", "--out", "x"],
        ["targets", "./nowhere/at/all"],
        ["fly"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_exit_2_without_a_traceback(arguments: list[str], tmp_path: Path) -> None:
    answer = lora_search(*arguments, cwd=tmp_path)
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
    assert answer.stderr.strip()
    assert answer.stdout == ""


@pytest.fixture
def recorded(tiny: Path, tmp_path: Path) -> RunDirectory:
    """A run directory as a sweep leaves it half way: one trial completed, one failed, one running."""
    run = create_run(tmp_path, "recorded", exact=True)
    run.spec.write_text(dump_spec(make_spec(tiny, name="recorded")))
    record = RunRecord(run.trials, clock=lambda: 1000.0)
    figures = {"perplexity": 7.4, "token_accuracy": 0.5, "train_loss": 2.1, "grad_norm": 1.0, "lr": 1e-3, "host": "h"}
    figures |= {"tokens": 640, "tokens_per_second": 99.0, "seconds": 6.5, "peak_memory_bytes": 10, "history": []}
    for trial, rank in enumerate((4, 8, 2)):
        parameters = {"rank": rank, "alpha": 2.0 * rank, "dropout": 0.0, "learning_rate": 1e-3}
        record.trial_started(trial, parameters | {"target_modules": ["q_proj", "v_proj"]})
        report = figures | {"step": 8 - trial, "steps_total": 8, "eval_loss": 2.0 + trial, "trainable_parameters": 512}
        record.trial_reported(trial, report)
    record.trial_ended(0, "completed", None)
    record.trial_ended(1, "failed", "loss is nan at step 8")
    record.close()
    return run


def test_results_as_json_is_one_document_of_rows(recorded: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", str(recorded.path), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["completed", "failed", "running"]
    needed = {"trial", "state", "steps", "rank", "alpha", "dropout", "target_modules", "learning_rate", "eval_loss"}
    needed |= {"train_loss", "trainable_parameters", "tokens", "seconds", "host"}
    assert all(needed <= row.keys() for row in rows)
    assert rows[1]["reason"] == "loss is nan at step 8"
    assert (rows[0]["steps"], rows[0]["eval_loss"], rows[0]["target_modules"]) == (8, 2.0, ["q_proj", "v_proj"])


def test_results_as_csv_and_parquet_hold_the_same(
    recorded: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["results", str(recorded.path), "--format", "csv", "--out", str(tmp_path / "rows.csv")]) == 0
    assert main(["results", str(recorded.path), "--format", "parquet", "--out", str(tmp_path / "rows.parquet")]) == 0
    assert capsys.readouterr().out == ""
    csv, parquet = pd.read_csv(tmp_path / "rows.csv"), pd.read_parquet(tmp_path / "rows.parquet")
    for name in ("trial", "state", "steps", "eval_loss", "rank"):
        assert csv[name].tolist() == parquet[name].tolist()


def test_results_table_shows_the_best_first(recorded: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", str(recorded.path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert "completed" in lines[0]
    assert len(lines) == 3


def test_parquet_needs_a_file(recorded: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", str(recorded.path), "--format", "parquet"]) == 2
    assert "--out" in capsys.readouterr().err


def test_run_is_found_by_its_name(
    recorded: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recorded.path.parent.parent / "elsewhere"
    (folder / "runs").mkdir(parents=True)
    recorded.path.rename(folder / "runs" / "recorded")
    monkeypatch.chdir(folder)
    assert main(["status", "recorded", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["trials"] == {"running": 1, "completed": 1, "stopped": 0, "failed": 1}
    assert status["best"]["trial"] == 0
    assert main(["status", "recordet"]) == 2
    assert "runs has recorded" in capsys.readouterr().err


def test_status_says_what_runs_where_and_what_failed(
    recorded: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts: list[Any] = [
        {"name": "h", "node": "0123456789ab", "capacity": 4},
        {"name": "idle", "node": "0123456789ab", "capacity": 4},
        {"name": "gone", "node": "ffffffffffff", "capacity": 4, "lost": "its node is gone"},
        {"name": "comes", "node": "ffffffffffff", "capacity": None},
    ]
    clock = iter((1010.0, 1020.0))
    record = RunRecord(recorded.trials, clock=lambda: next(clock))
    record.trial_resumed(2, {}, 4, [])
    with locked(recorded):
        assert sweep_status(recorded)["hosts"] == {}  # where it is again has not been heard
        recorded.provenance.write_text(json.dumps({"hosts": hosts[:1]}))
        assert main(["status", str(recorded.path)]) == 0
        assert "h on node 01234567: none of its trials has reported yet, 99 tokens/s\n" in capsys.readouterr().out
    record.trial_reported(2, {"step": 7, "tokens": 1640, "tokens_per_second": 300.0, "host": "h", "history": []})
    record.close()
    here = "h on node 01234567: trial 2 (at most 4), 50 tokens/s\n"
    here += "  idle on node 01234567: none of its trials has reported yet"
    for facts, shown in (
        (hosts, f"{here}\n  gone on node ffffffff was lost: its node is gone"),
        ([7, {"name": "h", "capacity": "many"}], "h: trial 2, 50 tokens/s"),  # somebody else's
    ):
        recorded.provenance.write_text(json.dumps({"hosts": facts, "resumed": [7]}))
        with locked(recorded):
            assert main(["status", str(recorded.path)]) == 0
        said = capsys.readouterr().out
        assert "recorded: running, 2 of 8 trials have ended" in said
        assert f"\n  {shown}\n  trials went on from a checkpoint" in said
    assert "after a loss: once" in said
    assert "failed once: loss is nan at step 8" in said
    now = datetime.now(UTC) + timedelta(seconds=1)
    recorded.provenance.write_text(json.dumps({"hosts": hosts, "resumed": [now.isoformat()]}))
    with locked(recorded):  # of a process that has heard of no trial yet, and has a host of that name again
        assert main(["status", str(recorded.path)]) == 0
    said = capsys.readouterr().out
    assert "h on node 01234567: none of its trials has reported yet" in said
    assert "tokens/s" not in said
    assert main(["status", str(recorded.path)]) == 0
    said = capsys.readouterr().out
    assert "recorded: interrupted, 2 of 8" in said
    assert "1 that --resume goes on with, 1 completed" in said
    assert "tokens/s" not in said  # no host is there any more


def test_status_of_a_finished_sweep_that_goes_on_with_more_trials(
    recorded: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    def phase() -> str:
        assert main(["status", str(recorded.path), "--json"]) == 0
        return str(json.loads(capsys.readouterr().out)["phase"])

    recorded.best.mkdir()
    (recorded.best / "README.md").touch()  # it stays until there is a new best
    recorded.provenance.write_text('{"conclusion": {"trial": 0}}')
    assert phase() == "finished"
    with locked(recorded):
        assert phase() == "running"
    recorded.provenance.write_text("{}")  # as a run writes it when it goes on
    assert phase() == "interrupted"


def test_status_tells_the_best_that_has_ended_from_one_ahead_that_has_not(
    recorded: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(recorded.path)]) == 0
    said = capsys.readouterr().out
    assert "  best: trial 0, eval_loss 2.0000 at step 8\n" in said
    assert "ahead" not in said
    record = RunRecord(recorded.trials)
    record.trial_reported(2, {"step": 8, "steps_total": 16, "eval_loss": 1.5})
    record.close()
    assert main(["status", str(recorded.path)]) == 0
    said = capsys.readouterr().out
    assert "  best: trial 0, eval_loss 2.0000 at step 8\n  ahead, and not at its end: trial 2, eval_loss 1.5000" in said


def test_last_line_cut_off_is_left_out(recorded: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    text = recorded.trials.read_text()
    recorded.trials.write_text(text[:-20])
    assert main(["status", str(recorded.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"]["running"] == 2


@pytest.mark.parametrize("name", ["42", "2026-11-24", "true", "1e3", "a.b"])
def test_name_is_taken_as_it_stands(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What YAML would read as a number or a date is a name all the same; seen by the run directory that is taken."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sweep.yaml").write_text("output: ~/runs\n")
    (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / name / "sweep.yaml").touch()
    assert main(["run", str(tmp_path / "sweep.yaml"), "--name", name]) == 2
    assert f"--name {name}: {tmp_path / 'runs' / name} exists already" in capsys.readouterr().err


def test_taken_name_is_refused_and_a_default_one_numbered(tmp_path: Path) -> None:
    from lora_search.errors import InputError

    names = [create_run(tmp_path, "demo", exact=False).name for _ in range(3)]
    assert names == ["demo", "demo-2", "demo-3"]
    assert create_run(tmp_path, "demo", exact=True).name == "demo"  # whoever took it was ended before anything else
    (tmp_path / "demo" / "sweep.yaml").touch()
    with pytest.raises(InputError, match="exists already"):
        create_run(tmp_path, "demo", exact=True)


def test_file_that_several_write_at_once_is_one_of_theirs(tmp_path: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in range(4)]

    def write(content: bytes) -> None:
        for _ in range(50):
            write_whole(tmp_path / "file", content)
            assert (tmp_path / "file").read_bytes() in contents

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, contents))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_newest_run_of_a_sweep_is_no_other_sweeps_whose_name_ends_in_a_number(tmp_path: Path) -> None:
    for folder, name in (
        ("demo", "demo"),
        ("demo-2", "demo"),
        ("demo-7", "demo-7"),
        ("demo-8", "[not yaml"),
        ("demo-9", "[" * 10_000),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sweep.yaml").write_text(f"name: {name}\n")
    found = {name: newest_run(tmp_path, name) for name in ("demo", "demo-7", "none")}
    assert {name: run and run.name for name, run in found.items()} == {
        "demo": "demo-2",
        "demo-7": "demo-7",
        "none": None,
    }
    exact = newest_run(tmp_path, "demo", exact=True)
    assert exact is not None
    assert exact.name == "demo"


def begun(output: Path, name: str, job: str | None, *before: str | None) -> RunDirectory:
    """A run directory as a sweep begins it in a scheduler's job, and as those that resume it leave it."""
    spec = parse_spec(f"name: {name}\noutput: {output}\n", source="sweep.yaml", folder=output)
    run = create_run(output, name, exact=False)
    run.spec.write_text(dump_spec(spec))
    with pytest.MonkeyPatch.context() as patch:
        for each in (*before, job):
            patch.setenv("LORA_SEARCH_JOB", each or "")
            write_provenance(run.provenance, provenance(spec, read_provenance(run.provenance)))
    return run


@pytest.fixture
def taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, bool]]:
    """Which run directory `lora-search run` takes in a job, and whether it goes on with it; a sweep `demo` is made."""
    found: list[tuple[str, bool]] = []

    def note(spec: Any, run: RunDirectory, observers: Any, *, resume: bool, **options: Any) -> None:
        found.append((run.name, resume))
        raise InputError("noted")

    def take(job: str, *options: str) -> tuple[str, bool]:
        monkeypatch.setenv("LORA_SEARCH_JOB", job)
        assert main(["run", str(tmp_path / "demo.yaml"), *options]) == 2
        return found.pop()

    monkeypatch.setattr("lora_search.sweep.run.run_sweep", note)
    (tmp_path / "demo.yaml").write_text(f"name: demo\noutput: {tmp_path / 'runs'}\n")
    return take


@pytest.mark.parametrize("options", [[], ["--resume"]], ids=["begins", "resumes"])
def test_job_that_is_started_again_takes_its_own_run(
    options: list[str], taken: Callable[..., tuple[str, bool]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, job in enumerate(("a", "b", "a", "c", None), start=1):  # None: by hand
        assert begun(tmp_path / "runs", "demo", job).name == ("demo" if number == 1 else f"demo-{number}")
    begun(tmp_path / "runs", "demo-7", "a")  # a sweep of its own
    capsys.readouterr()
    assert taken("a", *options) == ("demo-3", True)  # of its two the later
    said = capsys.readouterr().err
    assert f"lora-search: going on with {tmp_path / 'runs' / 'demo-3'}, the run of this job (a)\n" in said
    assert taken("b", *options) == ("demo-2", True)
    assert taken("c", *options) == ("demo-4", True)
    capsys.readouterr()
    assert taken("new", *options) == (("demo-5", True) if options else ("demo-6", False))
    assert "of this job" not in capsys.readouterr().err
    assert taken("", *options) == (("demo-5", True) if options else ("demo-8", False))


def test_run_is_of_the_job_that_resumed_it_last(taken: Callable[..., tuple[str, bool]], tmp_path: Path) -> None:
    begun(tmp_path / "runs", "demo", "b", "a")
    begun(tmp_path / "runs", "demo", None, "b", "c")
    assert taken("b") == ("demo", True)
    assert taken("a") == ("demo-3", False)
    assert taken("c") == ("demo-4", False)


def test_job_that_is_started_again_takes_the_run_of_the_name_that_it_was_given(
    taken: Callable[..., tuple[str, bool]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, job in (("demo", "a"), ("demo", "b"), ("other", "a")):
        begun(tmp_path / "runs", name, job)
    assert taken("a", "--name", "demo") == ("demo", True)
    assert taken("a", "--name", "other") == ("other", True)
    assert taken("b", "--name", "other", "--resume") == ("other", True)
    main(["run", str(tmp_path / "demo.yaml"), "--name", "demo"])
    assert main(["run", str(tmp_path / "demo.yaml"), "--name", "demo"]) == 2
    assert "exists already" in capsys.readouterr().err


HOSTILE = {
    "none": b"",
    "not JSON": b"{",
    "not text": b"\xff\xfe\xfd",
    "a list": b'["a"]',
    "another kind": b'{"job": ["a"]}',
    "null": b'{"job": null}',
    "deep": b'{"job": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_provenance_that_is_none_is_of_no_job(
    content: bytes, taken: Callable[..., tuple[str, bool]], tmp_path: Path
) -> None:
    begun(tmp_path / "runs", "demo", "a")
    begun(tmp_path / "runs", "demo", "a").provenance.write_bytes(content)
    begun(tmp_path / "runs", "demo", "a").provenance.unlink()
    unreadable = begun(tmp_path / "runs", "demo", "a").provenance
    unreadable.unlink()
    unreadable.mkdir()
    assert taken("a") == ("demo", True)
    assert taken("b", "--resume") == ("demo-4", True)
    assert taken("b") == ("demo-5", False)


def test_merge_refuses_what_it_cannot_do(
    recorded: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for trial, said in (("7", "no such trial"), ("first", "must be best or a trial's number"), ("2", "no checkpoint")):
        assert main(["merge", str(recorded.path), "--trial", trial, "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    assert main(["merge", str(recorded.path), "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_targets_prints_modules_and_sets(capsys: pytest.CaptureFixture[str]) -> None:
    config = shared("configs/llama-3-8b")
    assert main(["targets", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "13,631,488" in shown  # q k v o at rank 16
    assert max(map(len, shown.splitlines())) <= 100
    assert main(["targets", str(config), "--json"]) == 0
    sets = {row["name"]: row["trainable"] for row in json.loads(capsys.readouterr().out)["sets"]}
    assert sets["attention"]["16"] == 13_631_488


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("--version", "--help"):
        with pytest.raises(SystemExit) as ended:
            main([argument])
        assert ended.value.code == 0
    assert "targets" in capsys.readouterr().out


def test_doctor_says_what_this_machine_has(tmp_path: Path) -> None:
    answer = lora_search("doctor", "--output", str(tmp_path), "--json")
    assert answer.returncode == 0, answer.stderr
    checks = {check["what"]: check for check in json.loads(answer.stdout)}
    assert checks["NF4"]["state"] == "ok"
    assert "torch 2." in checks["packages"]["found"]
    assert not list(tmp_path.iterdir())


def test_doctor_fails_where_the_output_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = lora_search("doctor", "--output", str(tmp_path / "file" / "runs"))
    assert answer.returncode == 1
    assert "wrong" in answer.stdout
    assert "Traceback" not in answer.stderr
