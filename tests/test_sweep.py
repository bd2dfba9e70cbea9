"""A whole sweep, with a real Ray, a real Optuna storage and real NF4 trials."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import noted_steps
import pytest
import torch
import yaml
from conftest import PATIENCE, make_spec, processes, wait_until
from noted_steps import noted, saved_steps
from optuna.trial import TrialState
from trained_run import train_run

from lora_search.cli import main
from lora_search.cli.results import sweep_status
from lora_search.errors import InputError, Interrupted, SweepError
from lora_search.journal import open_study
from lora_search.results import read_events, run_rows
from lora_search.rundir import RunDirectory, create_run, locked, newest_run
from lora_search.spec import load_spec
from lora_search.sweep.run import Outcome, run_sweep
from lora_search.sweep.signals import (
    signals_end_tune,
    sigterm_as_sigint,
    sigterm_interrupts,
    sigterm_kept_from_ray,
)
from lora_search.tracking import Observer

if TYPE_CHECKING:
    from lora_search.spec import SweepSpec


ONE = {"count": 1}
"""A host: each imports torch and its libraries for six seconds."""


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One Ray for the sweeps of this file: starting it anew costs seconds each time."""
    import ray

    from lora_search.sweep.cluster import cluster

    with cluster(None):
        yield ray


class Witness(Observer):
    """Looks at the seats' processes while the sweep runs, and counts what it is told."""

    def __init__(self) -> None:
        self.seats: dict[int, str] = {}
        self.ended: list[tuple[int, str]] = []
        self.concluded_with: tuple[int, int] | None = None

    def trial_reported(self, trial: int, report: Mapping[str, Any]) -> None:
        for pid in processes("ray::Seat"):
            if pid not in self.seats:
                with suppress(OSError):
                    self.seats[pid] = Path(f"/proc/{pid}/maps").read_text()

    def trial_ended(self, trial: int, state: str, reason: str | None) -> None:
        self.ended.append((trial, state))

    def concluded(self, rows: Any, best: Mapping[str, Any], adapter: Path) -> None:
        self.concluded_with = (len(rows), best["trial"])


@pytest.fixture(scope="module")
def finished(ray: Any, tiny: Path) -> tuple[SweepSpec, Outcome, Witness]:
    """A sweep of eight trials that has come to its end."""
    spec = make_spec(tiny, hosts={"count": 1, "trials_per_host": 3}, name="finished")
    witness = Witness()
    return spec, run_sweep(spec, create_run(Path(spec.output), spec.name, exact=False), [witness]), witness


def test_every_trial_is_in_the_study_the_record_and_the_results_once(
    finished: tuple[SweepSpec, Outcome, Witness],
) -> None:
    spec, outcome, witness = finished
    study = open_study(outcome.run.path)
    rows = run_rows(outcome.run)
    numbers = list(range(spec.search.trials))
    assert [trial.number for trial in study.trials] == numbers
    assert [row["trial"] for row in rows] == numbers
    assert sorted(trial for trial, _ in witness.ended) == numbers
    states = {"completed": TrialState.COMPLETE, "stopped": TrialState.PRUNED}
    assert [states[row["state"]] for row in rows] == [trial.state for trial in study.trials]


def test_finished_sweep_that_is_resumed_again_and_again_stays_as_it_is(
    finished: tuple[SweepSpec, Outcome, Witness],
) -> None:
    def contents() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in outcome.run.path.rglob("*") if file.is_file()}

    spec, outcome, witness = finished
    before, said = contents(), list[str]()
    for _ in range(2):
        again = run_sweep(spec, outcome.run, [witness], resume=True, say=said.append)
        assert (again.rows, again.best, again.conclusion) == (outcome.rows, outcome.best, outcome.conclusion)
    assert said == ["the sweep is finished; nothing is left to do"] * 2
    assert contents() == before


def test_study_and_record_agree_on_every_report(finished: tuple[SweepSpec, Outcome, Witness]) -> None:
    _, outcome, _ = finished
    study = open_study(outcome.run.path)
    reports: dict[int, dict[int, float]] = {}
    for event in read_events(outcome.run.trials):
        if event["event"] == "report":
            reports.setdefault(event["trial"], {})[event["step"]] = event["eval_loss"]
    assert reports == {trial.number: trial.intermediate_values for trial in study.trials}


def test_weak_trials_are_stopped_early(finished: tuple[SweepSpec, Outcome, Witness]) -> None:
    spec, outcome, _ = finished
    steps = {row["trial"]: row["steps"] for row in outcome.rows}
    stopped = [row for row in outcome.rows if row["state"] == "stopped"]
    assert stopped
    assert all(steps[row["trial"]] < spec.training.steps for row in stopped)
    assert all(row["steps"] == spec.training.steps for row in outcome.rows if row["state"] == "completed")


@pytest.mark.parametrize("library", ["/libtorch", "/pandas/"])  # the second comes with Ray Tune
def test_seats_never_import(finished: tuple[SweepSpec, Outcome, Witness], library: str) -> None:
    _, _, witness = finished
    assert witness.seats
    assert not [pid for pid, maps in witness.seats.items() if library in maps]


def test_seats_are_reused(finished: tuple[SweepSpec, Outcome, Witness]) -> None:
    _, outcome, witness = finished
    assert len(witness.seats) <= 4 < len(outcome.rows)


def test_best_is_the_lowest_and_everything_of_it_is_there(finished: tuple[SweepSpec, Outcome, Witness]) -> None:
    spec, outcome, witness = finished
    assert outcome.best["eval_loss"] == min(row["eval_loss"] for row in outcome.rows)
    assert witness.concluded_with == (spec.search.trials, outcome.best["trial"])
    best = outcome.run.best
    assert (best / "adapter" / "adapter_model.safetensors").is_file()
    assert (best / "merged" / "config.json").is_file()
    assert "quantization_config" not in json.loads((best / "merged" / "config.json").read_text())
    assert f"| {outcome.best['trial']} | completed" in (best / "README.md").read_text()
    assert f"Trial {outcome.best['trial']} is the best of {len(outcome.rows)}" in outcome.run.report.read_text()
    # the adapter that was saved is the one that was reported
    assert outcome.conclusion.validation_loss == pytest.approx(outcome.best["eval_loss"], rel=1e-6)
    assert outcome.conclusion.test_loss_interval is not None
    low, high = outcome.conclusion.test_loss_interval
    assert 0 < low < outcome.conclusion.test_loss < high


@pytest.mark.usefixtures("unverified_merge")
def test_best_config_is_a_sweep_of_one_that_comes_to_the_same_result(
    finished: tuple[SweepSpec, Outcome, Witness],
) -> None:
    _, outcome, _ = finished
    spec = load_spec(outcome.run.best / "config.yaml")
    again = run_sweep(spec, create_run(Path(spec.output), spec.name, exact=False))
    assert len(again.rows) == 1
    assert again.best["eval_loss"] == outcome.best["eval_loss"]  # to the bit, whatever ran beside it then


def test_resolved_sweep_file_reads_back(finished: tuple[SweepSpec, Outcome, Witness]) -> None:
    spec, outcome, _ = finished
    assert load_spec(outcome.run.spec) == spec


def test_provenance_says_what_made_the_result(finished: tuple[SweepSpec, Outcome, Witness]) -> None:
    _, outcome, _ = finished
    facts = json.loads(outcome.run.provenance.read_text())
    assert facts["packages"]["torch"]
    assert facts["seeds"] == {"sampler": 0, "training": 0}
    assert len(facts["data"]["fingerprint"]) == len(facts["base"]["fingerprint"]) == 64
    assert facts["hosts"][0]["capacity"] == 3


@pytest.mark.usefixtures("unverified_merge")
def test_failed_trial_says_why_and_harms_no_other(ray: Any, tiny: Path, tmp_path: Path) -> None:
    grid = {"sampler": {"name": "grid"}, "scheduler": {"name": "none"}, "enqueue": []}
    space = {"rank": {"choice": [2, 4]}, "alpha": 8.0, "dropout": 0.1, "learning_rate": {"choice": [1e-3, 1e30]}}
    training = {"max_grad_norm": 0.0, "warmup_ratio": 0.0}
    spec = make_spec(tiny, name="failing", hosts=ONE, search={"space": space, **grid}, training=training)
    outcome = run_sweep(spec, create_run(Path(spec.output), spec.name, exact=False))
    failed = [row for row in outcome.rows if row["state"] == "failed"]
    assert sorted((row["rank"], row["learning_rate"]) for row in failed) == [(2, 1e30), (4, 1e30)]
    assert all("at step" in row["reason"] and "Error" not in row["reason"] for row in failed)
    assert not any("given up" in row["reason"] for row in failed)  # they were tried once
    study = open_study(outcome.run.path)
    assert [trial.number for trial in study.trials if trial.state == TrialState.FAIL] == [r["trial"] for r in failed]
    assert not [trial for trial in study.trials if not trial.state.is_finished()]

    unharmed = [({name: row[name] for name in space}, 8) for row in outcome.rows if row["learning_rate"] == 1e-3]
    torch.set_num_threads(1)  # as the host: the last bits of a product may depend on how many it has
    alone = train_run(spec, tmp_path, unharmed, every=8)
    beside = {row["rank"]: row["eval_loss"] for row in outcome.rows if row["learning_rate"] == 1e-3}
    assert {row["rank"]: row["eval_loss"] for row in run_rows(alone)} == beside


def test_sweep_of_failures_only_says_so(ray: Any, tiny: Path) -> None:
    spec = make_spec(
        tiny,
        name="hopeless",
        hosts=ONE,
        search={
            "space": {"learning_rate": 1e30, "alpha": 1e30, "dropout": {"uniform": [0.0, 0.1]}},
            "trials": 1,
            "enqueue": [],
        },
        training={"max_grad_norm": 0.0, "warmup_ratio": 0.0},
    )
    with pytest.raises(SweepError, match="no trial of 1 came to a result"):
        run_sweep(spec, create_run(Path(spec.output), spec.name, exact=False))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"search": {"space": {"target_modules": {"choice": ["q_prooj"]}}}}, "q_proj"),
        ({"hosts": {"count": 99}}, "hosts.count"),
    ],
)
def test_what_no_trial_could_do_ends_the_sweep_before_any_trial(
    ray: Any, tiny: Path, sections: dict[str, Any], message: str
) -> None:
    spec = make_spec(tiny, name="impossible", **{"hosts": ONE, **sections})
    run = create_run(Path(spec.output), spec.name, exact=False)
    with pytest.raises(InputError, match=message):
        run_sweep(spec, run)
    assert not run.path.exists()


@pytest.mark.slow
def test_two_hosts_share_the_trials(ray: Any, tiny: Path) -> None:
    hosts = {"count": 2, "cpus_per_host": 1, "trials_per_host": 1}
    spec = make_spec(
        tiny, name="two-hosts", hosts=hosts, search={"trials": 4}, training={"steps": 80, "eval_every": 40}
    )
    outcome = run_sweep(spec, create_run(Path(spec.output), spec.name, exact=False))
    assert {row["host"] for row in outcome.rows} == {"host-0", "host-1"}


def test_sigterm_before_there_is_a_ray_leaves_what_can_be_resumed(tiny: Path, tmp_path: Path) -> None:
    spec = make_spec(tiny, name="early", hosts=ONE, output=str(tmp_path))
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    command = [sys.executable, "-m", "lora_search", "run", str(file), "--name", "early"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    assert "early -> " in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert not (tmp_path / "early" / "trials.jsonl").exists()
    left = newest_run(tmp_path, "early", exact=True) or create_run(tmp_path, "early", exact=True)
    assert left.path == tmp_path / "early"
    left.spec.touch()
    with pytest.raises(InputError, match="exists already"):
        create_run(tmp_path, "early", exact=True)


class Preempted(Observer):
    """Slurm warns the driver when a trial has come to a step."""

    def trial_reported(self, trial: int, report: Mapping[str, Any]) -> None:
        signal.raise_signal(signal.SIGTERM)


def job_of(run: RunDirectory) -> object:
    return json.loads(run.provenance.read_text())["job"]


@pytest.mark.usefixtures("ray", "unverified_merge")
def test_job_that_is_started_again_goes_on_with_its_own_run_whatever_others_have_begun(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = {"trials": 2, "scheduler": {"name": "none"}}
    spec = make_spec(tiny, name="again", hosts=ONE, search=search, output=str(tmp_path))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    runs = []
    for job in ("first", "second"):
        monkeypatch.setenv("LORA_SEARCH_JOB", job)
        runs.append(create_run(tmp_path, spec.name, exact=False))
        with pytest.raises(Interrupted):
            run_sweep(spec, runs[-1], [Preempted()])
    own, others = runs
    assert (job_of(own), job_of(others)) == ("first", "second")
    left = others.provenance.read_bytes(), others.trials.read_bytes()

    monkeypatch.setenv("LORA_SEARCH_JOB", "first")
    assert main(["run", str(tmp_path / "sweep.yaml")]) == 0
    assert f"going on with {own.path}, the run of this job (first)\n" in capsys.readouterr().err
    facts = json.loads(own.provenance.read_text())
    assert (facts["job"], len(facts["resumed"]), "conclusion" in facts) == ("first", 1, True)
    assert len(run_rows(own)) == 2
    assert (others.provenance.read_bytes(), others.trials.read_bytes()) == left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "again-2", "sweep.yaml"]

    def preempt(*arguments: Any) -> None:
        raise Interrupted("preempted")

    monkeypatch.setattr("lora_search.sweep.run.Hosts", preempt)
    for job in ("third", ""):  # the latter: by hand
        monkeypatch.setenv("LORA_SEARCH_JOB", job)
        with pytest.raises(Interrupted):
            run_sweep(spec, others, resume=True)
        assert job_of(others) == (job or None)  # from the moment in which it was taken up
        taken = json.loads(others.provenance.read_text())
        assert taken["hosts"] == []  # those of before are no more, and there are no others yet
    assert len(taken["resumed"]) == 2
    with locked(others):
        status = sweep_status(others)
    assert (status["phase"], status["hosts"]) == ("running", {})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_before_tune_listens_or_after_it_has_interrupts_the_sweep(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), signals_end_tune():
        signal.raise_signal(number)
    with signals_end_tune() as came:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Tune leaves a handler of its own, which does nothing any more
        signal.raise_signal(number)
        assert came.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_sigterm_while_ray_starts_interrupts_the_sweep() -> None:
    with (
        pytest.raises(Interrupted, match="with --resume goes on"),
        sigterm_interrupts("runs/a"),
        sigterm_kept_from_ray(),
    ):
        sys.exit(signal.SIGTERM)  # as Ray's own handler does
    with sigterm_as_sigint():
        with sigterm_kept_from_ray():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_interrupt_ends_the_sweep_cleanly(tiny: Path, tmp_path: Path) -> None:
    """Each trial is saved where it stands, long before there is anything to report of it."""
    endless: dict[str, Any] = {"training": {"steps": 100_000, "eval_every": 50_000}}
    endless |= {"search": {"scheduler": {"name": "none"}}, "hosts": ONE | {"trials_per_host": 2}}
    spec = make_spec(tiny, name="interrupted", output=str(tmp_path), **endless)
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    process = subprocess.Popen(
        [sys.executable, noted_steps.__file__, "run", str(file)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    run = RunDirectory(tmp_path / "interrupted")
    wait_until(lambda: len(dict(noted(tmp_path))) == 2, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    assert "interrupted after 0 of 8 trials" in said
    assert "Traceback" not in said
    assert [(row["trial"], row["state"], row["steps"]) for row in run_rows(run)] == [
        (0, "running", 0),
        (1, "running", 0),
    ]
    assert saved_steps(run) == {trial: [step] for trial, step in noted(tmp_path)}
