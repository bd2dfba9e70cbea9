"""A sweep inside of a Ray job: on a real head with its job server, by `ray job submit`."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, make_spec, wait_until
from test_cluster import short_folder  # noqa: F401  # a fixture
from test_faults import require_whole

from lora_search.cli.main import main
from lora_search.errors import InputError
from lora_search.job import cluster_address, lasting, refuse_passing_output
from lora_search.results import read_events, run_rows
from lora_search.rundir import RunDirectory
from lora_search.spec import dump_spec

COPY = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef"


@pytest.mark.parametrize(
    ("said", "given", "address"),
    [
        ("", None, None),
        ("", "auto", "auto"),
        ("", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("10.0.0.1:6379", None, "10.0.0.1:6379"),
        ("10.0.0.1:6379", "auto", "10.0.0.1:6379"),
        ("10.0.0.1:6379", "10.0.0.2:6379", "10.0.0.2:6379"),
        ("10.0.0.1:6379", "local", None),
        ("local", None, None),
        ("http://127.0.0.1:8265", None, None),
    ],
)
def test_sweep_runs_on_the_cluster_of_its_job(
    monkeypatch: pytest.MonkeyPatch, said: str, given: str | None, address: str | None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", said)
    assert cluster_address(given)[0] == address


@pytest.mark.parametrize(("said", "given"), [("ray://head:10001", None), ("", "http://head:8265")])
def test_address_that_is_a_url_is_refused(monkeypatch: pytest.MonkeyPatch, said: str, given: str | None) -> None:
    monkeypatch.setenv("RAY_ADDRESS", said)
    with pytest.raises(InputError, match=f"found '{said or given}'; allowed: HOST:PORT .*`ray job submit`"):
        cluster_address(given)


def test_output_that_goes_with_the_job_is_refused() -> None:
    with pytest.raises(InputError, match=r"output: found '/tmp/.*which lies in the job's copy"):
        refuse_passing_output(f"{COPY}/runs")
    refuse_passing_output("/shared/runs")
    refuse_passing_output("s3://bucket/_ray_pkg_1/runs")


def test_copies_of_a_working_directory_are_one() -> None:
    assert lasting(f"{COPY}/data/rows.jsonl") == lasting(f"{COPY[:-1]}0/data/rows.jsonl") == "data/rows.jsonl"
    assert lasting("/shared/rows.jsonl") == "/shared/rows.jsonl"
    assert lasting(3) == 3


class Head:
    """A head node with a job server, and `ray job` on it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        self._environment.pop("RAY_ADDRESS", None)
        self._server = f"http://127.0.0.1:{self._start()}"

    def _start(self) -> int:
        gcs, dashboard, agent, client = _free_ports(4)
        ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        ports += [f"--dashboard-agent-listen-port={agent}"]
        start = ["start", "--head", "--num-cpus=2", "--num-gpus=0", f"--temp-dir={self.folder}", *ports]
        answer = self._ray(*start, "--include-dashboard=true", "--disable-usage-stats")
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return dashboard

    def job(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._ray("job", command, "--address", self._server, *arguments)

    def _ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *arguments],
            capture_output=True,
            text=True,
            env=self._environment,
            timeout=PATIENCE,
        )

    def processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(self.folder in part for part in process.cmdline()):
                    yield process

    def trains(self) -> bool:
        """Whether a host of ours is a process of this head's raylet."""
        titles = []
        for process in self.processes():
            with suppress(psutil.Error):
                titles += [" ".join(child.cmdline()) for child in process.children()]
        return any(title.startswith("ray::Host") for title in titles)

    def end(self) -> None:
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def head(short_folder: str) -> Iterator[Head]:  # noqa: F811
    pytest.importorskip("ray.dashboard.optional_deps", reason="needs Ray's job server: pip install 'ray[default]'")
    head = Head(short_folder)
    try:
        yield head
    finally:
        head.end()


STOPS_GRACEFULLY = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})


@pytest.mark.slow
def test_job_that_is_stopped_is_gone_on_with_by_the_next(head: Head, tiny: Path, tmp_path: Path) -> None:
    """Sweep file, base and data travel with the job; the second job's working directory is not quite the first's."""
    work, shared = tmp_path / "work", tmp_path / "shared"
    shutil.copytree(tiny, work, ignore=shutil.ignore_patterns("runs"))
    hosts, long = {"count": 1, "trials_per_host": 2}, {"steps": 300, "eval_every": 60}
    spec = make_spec(work, name="job", hosts=hosts, search={"trials": 4}, training=long, output=str(shared))
    (work / "sweep.yaml").write_text(dump_spec(spec).replace(f"{work}/", ""))
    command = [sys.executable, "-m", "lora_search", "run", "sweep.yaml"]
    submit = ["--working-dir", str(work), "--runtime-env-json", STOPS_GRACEFULLY]
    run = RunDirectory(shared / "job")

    answer = head.job("submit", *submit, "--submission-id", "first", "--no-wait", "--", *command)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    wait_until(lambda: run.trials.exists() and '"report"' in run.trials.read_text())
    assert head.trains()
    stopped = head.job("stop", "first")
    assert "Job 'first' was stopped" in stopped.stdout, stopped.stdout + stopped.stderr
    said = head.job("logs", "first").stdout
    assert "on the Ray cluster" in said
    assert "base.model and data.path lie in the job's copy of its working directory" in said
    assert "trials; what they came to is in" in said
    events = list(read_events(run.trials))
    saved = {event["trial"]: event["step"] for event in events if event["event"] == "checkpoint"}
    running = {row["trial"]: saved.get(row["trial"], 0) for row in run_rows(run) if row["state"] == "running"}
    assert running

    assert main(["status", str(run.path)]) == 0  # here, where the job's paths may lead nowhere
    (work / "notes.txt").write_text("this makes it another working directory")
    answer = head.job("submit", *submit, "--submission-id", "second", "--", *command, "--resume")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    require_whole(run, 4)
    resumed = {event["trial"]: event["step"] for event in read_events(run.trials) if event["event"] == "resume"}
    assert resumed == {trial: step for trial, step in running.items() if step}
    assert "is the best of 4" in answer.stdout
