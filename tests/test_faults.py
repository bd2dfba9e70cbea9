"""Faults injected into a running sweep: no trial is lost or counted twice, none that had a checkpoint starts over.

The sweeps here are sequential, so that an undisturbed one has, to the bit, the results that a disturbed one must have.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import noted_steps
import psutil
import pytest
import yaml
from conftest import PATIENCE, flip_bit, made_once, make_spec, processes, wait_until
from noted_steps import build_noting, noted, saved_steps, steps_made
from optuna.trial import TrialState

from lora_search.checkpoint import KEPT
from lora_search.errors import InputError, SweepError
from lora_search.journal import JOURNAL_LOCK, open_study
from lora_search.results import Row, read_events, run_rows
from lora_search.rundir import RunDirectory, create_run
from lora_search.search.asha import StepAsha
from lora_search.search.study import create_study, distributions
from lora_search.spec import dump_spec, recorded_spec
from lora_search.sweep import run as sweep_module
from lora_search.sweep.resume import mend_last_line, refuse_fewer_trials, shorter_trials
from lora_search.sweep.run import run_sweep
from lora_search.tracking import Observer, RunRecord

if TYPE_CHECKING:
    from lora_search.engine import Engine
    from lora_search.placement import HostPlace
    from lora_search.spec import SweepSpec

SEQUENTIAL = {"count": 1, "trials_per_host": 1}
TRIALS = 5
SEARCH = {"trials": TRIALS, "sampler": {"name": "tpe", "seed": 14}}
"""By this seed trials end at steps 8, 2, 2, 8 and 4; whichever is the first of a resumed sweep, rung records decide."""

TOLD = {"completed": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
"""The study, of a trial's state."""
COMPARED = ("trial", "state", "steps", "rank", "target_modules", "learning_rate", "eval_loss", "train_loss", "tokens")


def sequential(tiny: Path, name: str, output: Path, **sections: Any) -> SweepSpec:
    search = SEARCH | sections.pop("search", {})
    return make_spec(tiny, name=name, hosts=SEQUENTIAL, search=search, output=str(output), **sections)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    from lora_search.sweep.cluster import cluster

    with cluster(None):
        yield ray


def without_faults(tiny: Path, factory: pytest.TempPathFactory) -> list[Row]:
    """What a sequential sweep comes to, wherever its run directory is."""

    def make(folder: Path) -> None:
        spec = sequential(tiny, "undisturbed", folder)
        rows = run_sweep(spec, create_run(folder, spec.name, exact=True)).rows
        (folder / "rows.json").write_text(json.dumps(compared(rows)))

    rows: list[Row] = json.loads((made_once("undisturbed", factory, make) / "rows.json").read_text())
    return rows


def undisturbed_run(factory: pytest.TempPathFactory) -> RunDirectory:
    """Of `without_faults`, once it has been."""

    def make(folder: Path) -> None:
        raise AssertionError("there is none")

    return RunDirectory(made_once("undisturbed", factory, make) / "undisturbed")


@pytest.fixture(scope="module")
def undisturbed(ray: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return without_faults(tiny, tmp_path_factory)


def compared(rows: list[Row]) -> list[Row]:
    return [{key: row[key] for key in COMPARED} for row in rows]


def require_whole(run: RunDirectory, trials: int) -> None:
    """Every planned trial once in study, record and results, which agree; no step twice; no trial over again."""
    numbers = list(range(trials))
    study, rows, metric = open_study(run.path), run_rows(run), recorded_spec(run.spec).search.metric
    assert [trial.number for trial in study.trials] == numbers
    assert [row["trial"] for row in rows] == numbers
    assert [trial.state for trial in study.trials] == [TOLD[row["state"]] for row in rows]
    values = {row["trial"]: row[metric] for row in rows if row["state"] == "completed"}
    assert {trial.number: trial.value for trial in study.trials if trial.state == TrialState.COMPLETE} == values
    events = list(read_events(run.trials))
    for kind in ("start", "end"):
        assert sorted(event["trial"] for event in events if event["event"] == kind) == numbers
    told = Counter((event["trial"], event["step"]) for event in events if event["event"] == "report")
    assert set(told.values()) == {1}
    saved: dict[int, list[int]] = {}
    for event in events:
        if event["event"] == "checkpoint":
            saved.setdefault(event["trial"], []).append(event["step"])
        elif event["event"] == "resume" and event["trial"] in saved:
            damaged = len(event["damaged"])
            whole = [0, *saved[event["trial"]]][: -damaged or None]
            assert event["step"] >= (whole[-1] if damaged < KEPT else 0)


class Strikes(Observer):
    """Does something, once each, when a trial has saved a step."""

    def __init__(self, strikes: Mapping[tuple[int, int], Callable[[], None]]) -> None:
        """
        Args:
            strikes: by trial and step.
        """
        self._strikes = dict(strikes)
        self.resumed: list[tuple[int, int, int]] = []

    def trial_saved(self, trial: int, step: int, path: str) -> None:
        if (strike := self._strikes.pop((trial, step), None)) is not None:
            strike()

    def trial_resumed(self, trial: int, parameters: Mapping[str, Any], step: int, damaged: Any) -> None:
        self.resumed.append((trial, step, len(damaged)))


def kill(title: str) -> None:
    victims = processes(title)
    assert victims, f"no process {title} to kill"
    for victim in victims:
        os.kill(victim, signal.SIGKILL)


def damage(run: RunDirectory, trial: int, step: int) -> None:
    """One bit of a checkpoint; and kill whoever knows it."""
    flip_bit(run.tune / f"trial-{trial:04d}" / f"checkpoint_{step:06d}" / "adapter_model.safetensors")
    kill("ray::Seat")


def build_sick(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> Engine:
    """A host's engine; that of host-0 says from its fourth step on what CUDA says of a device that is no more."""
    engine = build_noting(spec, place, capacity, data)
    step, steps = engine.step, itertools.count(1)

    def sick(trials: Sequence[str]) -> Any:
        if next(steps) > 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return step(trials)

    if place.name == "host-0":
        engine.step = sick  # type: ignore[method-assign]
    return engine


def decided(scheduler: StepAsha, events: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], str]:
    """What a scheduler says to each report, by trial and step, in the order of a record."""
    found = {}
    for event in events:
        trial: Any = SimpleNamespace(config={"trial": event["trial"]})
        if event["event"] == "start":
            scheduler.on_trial_add(None, trial)
        elif event["event"] == "report":
            found[event["trial"], event["step"]] = scheduler.on_trial_result(None, trial, event)
    return found


def test_resume_without_rung_records_would_show(
    undisturbed: list[Row], tiny: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of the sweep of this file, whichever trial it is resumed with."""
    spec = sequential(tiny, "undisturbed", tmp_path)
    events = list(read_events(undisturbed_run(tmp_path_factory).trials))
    kept = decided(StepAsha(spec), events)
    for first in range(1, TRIALS):
        left = [event for event in events if event["trial"] >= first]
        knowing = StepAsha(spec)
        knowing.replay(event for event in events if event["trial"] < first)
        assert decided(knowing, left).items() <= kept.items()
        assert not decided(StepAsha(spec), left).items() <= kept.items()


@pytest.mark.usefixtures("unverified_merge")
def test_sick_device_sigkill_of_host_and_seat_and_a_damaged_checkpoint_lose_nothing(
    ray: Any, tiny: Path, tmp_path: Path, undisturbed: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host whose device is sick is replaced: it would take one trial after the other, and fail it.

    Of the damaged checkpoint, the one before it is used; so it is of the best trial's last, when the sweep is to end.
    No steps are made twice but those since the checkpoint that a trial goes on from.
    """
    spec = sequential(tiny, "killed", tmp_path)
    run = create_run(tmp_path, spec.name, exact=True)
    for module in (sys.modules[__name__], noted_steps):
        ray.cloudpickle.register_pickle_by_value(module)
    monkeypatch.setattr(sweep_module, "build_engine", build_sick)
    strikes = Strikes(
        {(0, 2): lambda: kill("ray::Seat"), (0, 4): lambda: kill("ray::Host"), (0, 6): lambda: damage(run, 0, 6)}
    )
    said: list[str] = []
    adapters: list[bytes] = []

    def say(line: str) -> None:
        said.append(line)
        if " is best; " in line:
            last = max((run.tune / f"trial-{int(line.split()[1]):04d}").iterdir()) / "adapter_model.safetensors"
            adapters.append(last.read_bytes())
            flip_bit(last)

    outcome = run_sweep(spec, run, [strikes], say=say)
    for module in (sys.modules[__name__], noted_steps):
        ray.cloudpickle.unregister_pickle_by_value(module)
    assert [(run.best / "adapter" / "adapter_model.safetensors").read_bytes()] == adapters
    assert any("adapter_model.safetensors is damaged" in line and "is trained again" in line for line in said)
    require_whole(run, TRIALS)
    assert strikes.resumed == [(0, 2, 0), (0, 2, 0), (0, 4, 0), (0, 4, 1)]
    assert (
        "host-0 was lost: RuntimeError: CUDA error: an illegal memory access was encountered; its trials go on"
        in "|".join(said)
    )
    assert compared(outcome.rows) == undisturbed
    made = {(row["trial"], step): 1 for row in outcome.rows for step in range(1, row["steps"] + 1)}
    assert steps_made(tmp_path) == made | {(0, 3): 2, (0, 5): 2, (0, 6): 2}


@pytest.mark.slow
def test_trial_that_loses_every_seat_is_given_up_and_harms_no_other(ray: Any, tiny: Path, tmp_path: Path) -> None:
    """The machine's fault is tried again `hosts.max_retries` times."""

    class Killer(Observer):
        def trial_started(self, trial: int, parameters: Mapping[str, Any]) -> None:
            if trial == 1:
                kill("ray::Seat")

        def trial_resumed(self, trial: int, parameters: Mapping[str, Any], step: int, damaged: Any) -> None:
            if trial == 1:
                kill("ray::Seat")

    hosts = SEQUENTIAL | {"max_retries": 1}
    search = {"trials": 3, "scheduler": {"name": "none"}}
    spec = make_spec(tiny, name="killer", hosts=hosts, search=search, output=str(tmp_path))
    outcome = run_sweep(spec, create_run(tmp_path, spec.name, exact=True), [Killer()])
    require_whole(outcome.run, 3)
    states = {row["trial"]: row["state"] for row in outcome.rows}
    assert states[1] == "failed"
    assert "failed" not in (states[0], states[2])
    assert "given up after 1 retries" in outcome.rows[1]["reason"]


class Meanwhile(Observer):
    """Does something beside the sweep from when its first trial starts until it is concluded."""

    def __init__(self, work: Callable[[threading.Event], None]) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=work, args=(self._over,), daemon=True)

    def trial_started(self, trial: int, parameters: Mapping[str, Any]) -> None:
        if trial == 0:
            self._thread.start()

    def concluded(self, *everything: Any) -> None:
        self._over.set()


@pytest.mark.slow
def test_slow_host_loses_no_trial_and_gets_less_work(ray: Any, tiny: Path, tmp_path: Path) -> None:
    """One of two hosts stands still nine tenths of the time."""

    def hold_up(over: threading.Event) -> None:
        facts = json.loads(run.provenance.read_text())
        (victim,) = (host["pid"] for host in facts["hosts"] if host["name"] == "host-1")
        while not over.is_set():
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGSTOP)
                time.sleep(0.45)
                os.kill(victim, signal.SIGCONT)
                time.sleep(0.05)
                held_up.append(victim)

    held_up: list[int] = []
    hosts = {"count": 2, "cpus_per_host": 1, "trials_per_host": 1}
    search = {"trials": 10, "scheduler": {"name": "none"}}
    training = {"steps": 100, "eval_every": 50}
    spec = make_spec(tiny, name="slow", hosts=hosts, search=search, training=training, output=str(tmp_path))
    run = create_run(tmp_path, spec.name, exact=True)
    said: list[str] = []
    outcome = run_sweep(spec, run, [Meanwhile(hold_up)], say=said.append)
    require_whole(run, 10)
    assert len(held_up) > 5
    assert not [line for line in said if "was lost" in line or "starts on node" in line]
    assert not [event for event in read_events(run.trials) if event["event"] == "resume"]
    assert {row["state"] for row in outcome.rows} == {"completed"}
    work = Counter(row["host"] for row in outcome.rows)
    assert work.keys() == {"host-0", "host-1"}
    assert 0 < work["host-1"] < work["host-0"], work


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB and some thousand files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=4k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_host_that_is_lost_before_the_first_trial_or_after_the_last_is_replaced(
    ray: Any, tiny: Path, tmp_path: Path, undisturbed: list[Row]
) -> None:
    """While versions are compared and data is prepared, while it loads the base, while it tests and merges.

    And a trial whose only checkpoint is damaged begins anew, which is said.
    """
    spec = sequential(tiny, "edges", tmp_path)
    run = create_run(tmp_path, spec.name, exact=True)
    strikes = Strikes({(0, 2): lambda: damage(run, 0, 2)})
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        after = {"preparing": 3.0, "data:": 0.5, "trial": 1.0}.get(line.split()[0])
        if after is not None:
            threading.Timer(after, kill_host).start()

    def kill_host() -> None:
        wait_until(lambda: bool(processes("ray::Host")))  # as it was, or on a slow machine as soon as it is there
        kill("ray::Host")

    outcome = run_sweep(spec, run, [strikes], say=say)
    assert strikes.resumed == [(0, 0, 1)]
    assert sum("was lost: its process died" in line for line in said) == 3, said
    require_whole(outcome.run, TRIALS)
    assert compared(outcome.rows) == undisturbed
    assert (outcome.run.best / "merged" / "config.json").is_file()


@pytest.mark.usefixtures("unverified_merge")
def test_full_disk_ends_the_sweep_and_with_room_it_goes_on(
    ray: Any, tiny: Path, small_disk: Path, undisturbed: list[Row]
) -> None:
    """While a trial runs, and when it has just ended: the searcher's and the record's troubles are not that trial's."""
    spec = sequential(tiny, "full", small_disk)
    run = create_run(small_disk, spec.name, exact=True)
    fillers = small_disk / "fillers"

    def fill() -> None:
        fillers.mkdir()
        with (fillers / "filler").open("wb") as file, suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(1 << 12))

    def fill_with_files() -> None:
        fillers.mkdir()
        with suppress(OSError):
            for number in itertools.count():
                (fillers / str(number)).touch()

    full = r"cannot be written to: .*No space left on device.*; mend it, then --resume"
    for strike, resume in (((0, 4), fill), False), (((0, 8), fill_with_files), True):
        with pytest.raises(SweepError, match=full):
            run_sweep(spec, run, [Strikes(dict([strike]))], resume=resume)
        shutil.rmtree(fillers)
    outcome = run_sweep(spec, run, resume=True)
    require_whole(run, TRIALS)
    assert compared(outcome.rows) == undisturbed


@pytest.mark.usefixtures("unverified_merge")
def test_lock_of_the_study_that_cannot_be_given_back_is_one_message(
    ray: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna's own error says nothing of the file server that has gone, and Tune's holds no more than a text of it."""
    spec = sequential(tiny, "stale", tmp_path)
    run = create_run(tmp_path, spec.name, exact=True)
    struck: list[int] = []
    rename = os.rename

    def gone(file: str, to: str) -> None:
        if struck and file.endswith(JOURNAL_LOCK):
            raise OSError(errno.ESTALE, "Stale file handle")
        rename(file, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", gone)
        with pytest.raises(SweepError, match=r"cannot be written to: .*Stale file handle; mend it, then --resume"):
            run_sweep(spec, run, [Strikes({(0, 4): lambda: struck.append(4)})])
    run_sweep(spec, run, resume=True)
    require_whole(run, TRIALS)


NOTING = (noted_steps.__file__,)
"""The command, with hosts that note the steps that they make."""

SHORT = 2000
"""Steps of a trial that trains longer than an interrupted sweep takes to save it."""


def command(spec: SweepSpec, *options: str, program: Sequence[str] = ("-m", "lora_search")) -> list[str]:
    file = Path(spec.output) / f"{spec.name}.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    return [sys.executable, *program, "run", str(file), "--name", spec.name, *options]


def reported(run: RunDirectory, trial: int) -> bool:
    return run.trials.exists() and f'"event": "report", "trial": {trial}' in run.trials.read_text()


def warned(
    spec: SweepSpec,
    until: Callable[[subprocess.Popen[str]], object],
    *options: str,
    by: signal.Signals = signal.SIGTERM,
    all_hear_it: bool = False,
    program: Sequence[str] = ("-m", "lora_search"),
) -> str:
    """Run a sweep until something, and have it end by a signal that warns; what it said.

    Args:
        all_hear_it: its Ray's processes as well, as where systemd, Slurm or a machine that goes down sends it.
    """
    process = subprocess.Popen(command(spec, *options, program=program), stderr=subprocess.PIPE, text=True)
    until(process)
    main = psutil.Process(process.pid)
    for each in [*main.children(recursive=True), main] if all_hear_it else [main]:
        with suppress(psutil.NoSuchProcess):  # it has come to its end meanwhile
            each.send_signal(by)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    assert "the same command with --resume goes on" in said
    return said


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def says(what: str) -> Callable[[subprocess.Popen[str]], object]:
    def said(process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        assert any(what in line for line in process.stderr)

    return said


@pytest.mark.slow
def test_sweep_that_is_warned_in_every_phase_goes_on_as_if_nothing_had_been(
    ray: Any, tiny: Path, tmp_path: Path, undisturbed: list[Row]
) -> None:
    """SIGTERM while it prepares, in the middle, and while it merges; resumed each time, and then with more to do."""
    spec = sequential(tiny, "ended", tmp_path)
    run = RunDirectory(tmp_path / "ended")
    warned(spec, says("preparing the data"), all_hear_it=True)
    said = warned(spec, lambda process: wait_until(lambda: reported(run, 2), process), "--resume")
    assert re.search(rf"interrupted after \d of {TRIALS} trials", said)
    warned(spec, says("testing and merging"), "--resume")
    last = subprocess.run(command(spec, "--resume"), capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    require_whole(run, TRIALS)
    assert compared(run_rows(run)) == undisturbed

    run.report.unlink()  # as where the process was ended before it was made
    before = contents(run.path)
    again = subprocess.run(command(spec, "--resume"), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "nothing is left to do" in again.stderr
    assert again.stdout == last.stdout
    assert run.report.is_file()
    assert contents(run.path) == before | {run.report: run.report.read_bytes()}

    more = sequential(tiny, "ended", tmp_path, search={"trials": TRIALS + 2}, training={"steps": 12})
    told: list[str] = []
    outcome = run_sweep(more, run, resume=True, say=told.append)
    require_whole(run, TRIALS + 2)
    assert compared(outcome.rows)[:TRIALS] == undisturbed
    reports = [event for event in read_events(run.trials) if event["event"] == "report" and event["trial"] >= TRIALS]
    assert {report["steps_total"] for report in reports} == {12}
    assert any("completed at 8 steps stay as they are" in line for line in told), told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "all_hear_it"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)],
    ids=["SIGINT", "SIGTERM", "SIGTERM to all"],
)
def test_trial_that_was_interrupted_half_way_goes_on_to_more_steps(
    by: signal.Signals, all_hear_it: bool, tiny: Path, tmp_path: Path
) -> None:
    """From the step that it stood at, where nothing is reported; no step is made twice."""
    short, long = (
        sequential(
            tiny,
            "longer",
            tmp_path,
            search={"trials": 2, "scheduler": {"name": "none"}},
            training={"steps": steps, "eval_every": SHORT},
        )
        for steps in (SHORT, SHORT + 20)
    )
    run = RunDirectory(tmp_path / "longer")
    warned(
        short,
        lambda process: wait_until(lambda: (1, 10) in noted(tmp_path), process),
        by=by,
        all_hear_it=all_hear_it,
        program=NOTING,
    )
    stood = dict(noted(tmp_path))
    assert stood[0] == SHORT
    assert 10 <= stood[1] <= SHORT
    assert saved_steps(run) == {trial: [step] for trial, step in stood.items()}
    last = subprocess.run(command(long, "--resume", program=NOTING), capture_output=True, text=True, timeout=PATIENCE)
    assert last.returncode == 0, last.stderr
    require_whole(run, 2)
    resumed = [(event["trial"], event["step"]) for event in read_events(run.trials) if event["event"] == "resume"]
    assert resumed == [(1, stood[1])]
    ends = {row["trial"]: row["steps"] for row in run_rows(run)}
    assert ends == {0: SHORT, 1: SHORT + 20}
    assert steps_made(tmp_path) == {(trial, step): 1 for trial, end in ends.items() for step in range(1, end + 1)}


def test_sweep_whose_driver_is_killed_goes_on_as_if_nothing_had_been(
    tiny: Path, tmp_path: Path, undisturbed: list[Row]
) -> None:
    """And what it was writing is torn; it is resumed with a trial more, and keeps its name, whatever it is found by.

    Of `--resume --name demo-2`, the next `--resume` of demo is to find it.
    """
    spec = sequential(tiny, "ended", tmp_path)
    more = sequential(tiny, "ended", tmp_path, search={"trials": TRIALS + 1})
    run = RunDirectory(tmp_path / "ended")
    process = subprocess.Popen(command(spec), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: reported(run, 2), process)
    process.kill()
    process.communicate(timeout=PATIENCE)
    with run.trials.open("a") as record, (run.path / "study.journal").open("a") as journal:
        record.write('{"event": "report", "tri')
        journal.write('{"op_code": 6, "worker')

    run.spec.write_text(dump_spec(recorded_spec(run.spec).model_copy(update={"name": "its-own"})))
    second = subprocess.run(command(more, "--resume"), capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert recorded_spec(run.spec).name == "its-own"
    assert second.stderr.count("the last line was damaged, and is left out") == 2
    require_whole(run, TRIALS + 1)
    assert compared(run_rows(run))[:TRIALS] == undisturbed


@pytest.mark.slow
def test_sweep_whose_driver_is_killed_goes_on_to_more_steps(tiny: Path, tmp_path: Path) -> None:
    """What had ended stays as it is; what had not goes on from its last report."""
    short, long = (
        sequential(
            tiny,
            "longer",
            tmp_path,
            search={"trials": 3, "scheduler": {"name": "none"}},
            training={"steps": steps, "eval_every": 200},
        )
        for steps in (400, 420)
    )
    run = RunDirectory(tmp_path / "longer")
    process = subprocess.Popen(command(short), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: reported(run, 1), process)  # it is half way
    process.kill()
    process.communicate(timeout=PATIENCE)
    ended = {row["trial"] for row in run_rows(run) if row["state"] == "completed"}
    assert 0 in ended
    assert len(ended) < 3
    last = subprocess.run(command(long, "--resume"), capture_output=True, text=True, timeout=PATIENCE)
    assert last.returncode == 0, last.stderr
    require_whole(run, 3)
    assert {row["trial"]: row["steps"] for row in run_rows(run)} == {
        trial: 400 if trial in ended else 420 for trial in range(3)
    }
    resumed = [event["step"] for event in read_events(run.trials) if event["event"] == "resume"]
    assert len(resumed) <= 1  # of one trial at a time
    assert all(step >= 200 for step in resumed)


def test_fewer_steps_are_no_budget_to_resume_with(tiny: Path, tmp_path: Path) -> None:
    spec = sequential(tiny, "shorter", tmp_path)
    run = create_run(tmp_path, spec.name, exact=True)
    run.spec.write_text(dump_spec(spec))
    fewer = sequential(tiny, "shorter", tmp_path, training={"steps": 4})
    with pytest.raises(InputError, match=r"has trials of 8 steps; found training.steps: 4; allowed: 8 and more"):
        run_sweep(fewer, run, resume=True)


def test_fewer_trials_than_have_begun_are_no_budget_to_resume_with(tiny: Path, tmp_path: Path) -> None:
    """The one that had not ended would be said to run for ever."""
    spec = sequential(tiny, "smaller", tmp_path)
    run = create_run(tmp_path, spec.name, exact=True)
    run.spec.write_text(dump_spec(spec))
    record = RunRecord(run.trials)
    for trial in range(3):
        record.trial_started(trial, {})
        if trial != 1:
            record.trial_ended(trial, "stopped", None)
    record.close()
    fewer = sequential(tiny, "smaller", tmp_path, search={"trials": 2})
    with pytest.raises(InputError, match=r"has begun 3 trials; found search.trials: 2; allowed: 3 and more"):
        run_sweep(fewer, run, resume=True)


@pytest.mark.parametrize("ended", [True, False])
def test_trials_that_the_study_alone_has_begun_are_begun(tiny: Path, tmp_path: Path, ended: bool) -> None:
    """They were proposed, and had no seat yet, when the sweep was interrupted: they would run beyond the budget."""
    spec = sequential(tiny, "proposed", tmp_path)
    run = create_run(tmp_path, spec.name, exact=True)
    run.spec.write_text(dump_spec(spec))
    study = create_study(spec, run.path)
    record = RunRecord(run.trials)
    for trial in range(4):
        asked = study.ask(distributions(spec.search.space))
        if trial < 2:
            record.trial_started(trial, {})
            record.trial_ended(trial, "stopped", None)
        if trial < 2 or ended:
            study.tell(asked, state=TrialState.PRUNED)
    record.close()
    fewer = sequential(tiny, "proposed", tmp_path, search={"trials": 2})
    if ended:
        refuse_fewer_trials(fewer, run)
        return
    with pytest.raises(InputError, match=r"has begun 4 trials; found search.trials: 2; allowed: 4 and more"):
        run_sweep(fewer, run, resume=True)


@pytest.mark.parametrize(
    ("steps", "space", "said"),
    [(12, {}, "completed at 8 steps stay as they are"), (8, {}, ""), (12, {"steps": 12}, "")],
)
def test_more_steps_are_for_trials_that_had_not_ended(
    tiny: Path, tmp_path: Path, steps: int, space: dict[str, Any], said: str
) -> None:
    spec = sequential(tiny, "longer", tmp_path, training={"steps": steps}, search={"space": {"rank": 4, **space}})
    rows = [{"state": "completed", "steps": 8}, {"state": "stopped", "steps": 2}]
    assert said in (shorter_trials(spec, rows) or "")
    assert bool(said) == (shorter_trials(spec, rows) is not None)


@pytest.mark.parametrize(
    ("last", "stays"),
    [
        (b'{"event": "rep', b""),
        (b'{"event": "rep\n', b""),
        (bytes(512), b""),
        (bytes(512) + b"\n", b""),
        (b'{"event": "end"}\n', b'{"event": "end"}\n'),
    ],
    ids=["torn", "torn, with its end", "NULs", "NULs, with an end", "intact"],
)
def test_last_line_is_left_out_where_it_was_not_written_to_its_end(last: bytes, stays: bytes, tmp_path: Path) -> None:
    """As a machine leaves it that loses its power: what had been written last is torn, or is NULs."""
    file = tmp_path / "trials.jsonl"
    before = b'{"event": "start"}\n' * 2
    file.write_bytes(before + last)
    said = mend_last_line(file)
    assert file.read_bytes() == before + stays
    assert (said is None) == bool(stays)
    assert said is None or said.endswith(f"the last line was damaged, and is left out ({len(last)} bytes)")
    assert mend_last_line(file) is None


def test_another_sweep_is_not_resumed_and_what_changed_is_said(tiny: Path, tmp_path: Path) -> None:
    spec = sequential(tiny, "other", tmp_path)
    run = create_run(tmp_path, spec.name, exact=True)
    run.spec.write_text(dump_spec(spec))
    other = sequential(
        tiny,
        "other",
        tmp_path,
        search={"space": {"rank": {"choice": [2, 16]}}},
        data={"max_length": 16},
        base={"quantization": "none"},
    )
    with pytest.raises(InputError) as refused:
        run_sweep(other, run, resume=True)
    assert "data.max_length: found 16, was 32" in str(refused.value)
    assert "base.quantization: found 'none', was 'nf4'" in str(refused.value)
    assert "search.space.rank.choice: found [2, 16], was [2, 4, 8]" in str(refused.value)


@pytest.mark.parametrize("name", ["trials.jsonl", "study.journal"])
def test_run_whose_files_are_links_is_not_written_to(tiny: Path, tmp_path: Path, name: str) -> None:
    spec, victim = sequential(tiny, "linked", tmp_path), tmp_path / "victim"
    run = create_run(tmp_path, spec.name, exact=True)
    run.spec.write_text(dump_spec(spec))
    victim.write_text("mine")
    (run.path / name).symlink_to(victim)
    with pytest.raises(InputError, match=rf"--resume: \S+{name} is a link to {victim}; allowed: the file itself"):
        run_sweep(spec, run, resume=True)
    assert victim.read_text() == "mine"


OTHER = {"fingerprint": "0" * 64}


@pytest.mark.parametrize("job", ["", "another"])
def test_data_or_base_that_has_changed_is_not_resumed(
    job: str, ray: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_SEARCH_JOB", job)
    spec = sequential(tiny, "changed-data", tmp_path)
    run = create_run(tmp_path, spec.name, exact=True)
    from lora_search.spec import dump_spec

    run.spec.write_text(dump_spec(spec))
    longer = spec.model_copy(update={"training": spec.training.model_copy(update={"steps": 120})})
    for changed in ("data", "base"):
        run.provenance.write_text(known := json.dumps({changed: OTHER, "job": None}))
        with pytest.raises(InputError, match=f"the {changed} has changed since the sweep began: found .*, was 000"):
            run_sweep(longer, run, resume=True)
        assert run.provenance.read_text() == known  # a refusal leaves what it was refused for, and the sweep its steps
        assert run.spec.read_text() == dump_spec(spec)


def test_second_run_on_one_run_directory_is_refused(tiny: Path, tmp_path: Path) -> None:
    from lora_search.rundir import locked

    spec = sequential(tiny, "twice", tmp_path)
    run = create_run(tmp_path, spec.name, exact=True)
    with locked(run), pytest.raises(InputError, match="another lora-search run is writing to it"):
        run_sweep(spec, run)
    assert run.path.is_dir()  # it is the other's


def test_run_that_was_begun_or_removed_since_its_name_was_taken_is_refused(tiny: Path, tmp_path: Path) -> None:
    """As where another process took that name at the same moment, and has ended since."""
    spec = sequential(tiny, "twice", tmp_path)
    run = create_run(tmp_path, spec.name, exact=True)
    assert create_run(tmp_path, spec.name, exact=True) == run  # by then there was nothing in it
    run.spec.write_text(dump_spec(spec))
    before = contents(run.path)
    with pytest.raises(InputError, match=r"twice: another lora-search run has begun in it meanwhile; choose another"):
        run_sweep(spec, run)
    assert {file: content for file, content in contents(run.path).items() if file != run.lock} == before
    shutil.rmtree(run.path)
    with pytest.raises(InputError, match=r"twice: another lora-search run has removed it, which found its input wrong"):
        run_sweep(spec, run)
    assert not run.path.exists()


@pytest.mark.slow
def test_of_two_processes_that_take_one_name_at_once_one_is_refused(tiny: Path, tmp_path: Path) -> None:
    spec = sequential(tiny, "twice", tmp_path)
    twice = [subprocess.Popen(command(spec), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=PATIENCE)[1]: process.returncode for process in twice}
    assert sorted(said.values()) == [0, 2], said
    refusal = next(words for words, status in said.items() if status == 2).splitlines()[-1]
    run = RunDirectory(tmp_path / "twice")
    assert refusal in (
        f"lora-search: {run.path}: another lora-search run is writing to it",
        f"lora-search: --name twice: {run.path} exists already; choose another name",
    )
    require_whole(run, TRIALS)


@pytest.mark.parametrize("options", [[], ["--resume"]], ids=["anew", "resumed"])
def test_second_process_on_one_run_directory_is_refused(tiny: Path, tmp_path: Path, options: list[str]) -> None:
    """As where a job is submitted twice: the first has begun, and may have written."""
    from lora_search.rundir import locked

    spec = sequential(tiny, "twice", tmp_path)
    run = create_run(tmp_path, spec.name, exact=True)
    if options:
        run.spec.write_text(dump_spec(spec))
    with locked(run):
        before = contents(run.path)
        second = subprocess.run(command(spec, *options), capture_output=True, text=True, timeout=PATIENCE)
        assert contents(run.path) == before
    assert second.returncode == 2
    assert second.stderr.splitlines() == [
        f"lora-search: twice -> {run.path}",
        f"lora-search: {run.path}: another lora-search run is writing to it",
    ]
