"""Machines whose clocks are ten minutes off, ahead and behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import PATIENCE, make_spec, preloaded
from test_faults import require_whole
from test_store import Store, server, store  # noqa: F401  # fixtures

from lora_search.doctor import Check, examine
from lora_search.lease import LEASE, LEASE_S, leased
from lora_search.report import document
from lora_search.results import open_run, read_events
from lora_search.rundir import RunDirectory, create_run
from lora_search.spec import SweepSpec, dump_spec
from lora_search.storage import Folder
from lora_search.sweep.run import run_sweep
from lora_search.tracking import Observer, RunRecord

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

OFF_S = 600
BOTH = (OFF_S, -OFF_S)


def clock(off_s: int) -> dict[str, str]:
    """Of the environment of a process whose clock is so many seconds off; files keep their times."""
    return {"LD_PRELOAD": preloaded("shifted_clock.c"), "CLOCK_SHIFT_S": str(off_s)}


def answer(off_s: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | clock(off_s), timeout=PATIENCE)


@pytest.fixture(autouse=True)
def _clocks_are_off() -> None:
    """The tests here show nothing where the clock that they set is not set, or where waiting does not work with it."""
    code = "import time, threading; time.sleep(0.1); threading.Event().wait(0.1); print(time.time())"
    for off_s in BOTH:
        assert float(answer(off_s, "-c", code).stdout) == pytest.approx(time.time() + off_s, abs=60)


TAKE = """
import sys, time
from lora_search.errors import InputError
from lora_search.lease import is_leased, leased
from lora_search.storage import Folder
folder = Folder(sys.argv[1])
print(is_leased(folder))
try:
    with leased(folder):
        print("taken", flush=True)
        time.sleep(float(sys.argv[2]))
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("off_s", BOTH)
def test_lease_is_not_stolen_by_a_machine_whose_clock_is_off(store: Store, tmp_path: Path, off_s: int) -> None:  # noqa: F811
    folder = Folder(store.uri(f"leases/{tmp_path.name}"))
    with leased(folder) as held:
        assert answer(off_s, "-c", TAKE, folder.place, "0").stdout.splitlines() == [
            "True",
            f"{folder.place}: another lora-search run is writing to it",
        ]
        time.sleep(4)
        assert held()
    assert answer(off_s, "-c", TAKE, folder.place, "0").stdout.splitlines() == ["False", "taken"]


@pytest.mark.slow
@pytest.mark.parametrize("off_s", BOTH)
def test_lease_of_a_killed_machine_whose_clock_was_off_is_free_after_its_time(
    store: Store,  # noqa: F811
    tmp_path: Path,
    off_s: int,
) -> None:
    folder = Folder(store.uri(f"leases/{tmp_path.name}"))
    command = [sys.executable, "-c", TAKE, folder.place, "100"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | clock(off_s))
    assert holder.stdout
    assert [holder.stdout.readline().strip() for _ in range(2)] == ["False", "taken"]
    holder.kill()
    holder.communicate()
    assert LEASE in folder.names()
    began = time.monotonic()
    with leased(folder) as held:
        assert LEASE_S / 2 < time.monotonic() - began < 3 * LEASE_S
        assert held()


def add_node(cluster: Cluster, off_s: int, env_vars: Mapping[str, str] | None = None) -> None:
    """A node with a GPU, all of whose processes have a clock that is off: raylet, agents and workers."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({**clock(off_s), "RAY_LD_PRELOAD_ON_WORKERS": "1"} if off_s else {}).items():
            patch.setenv(name, value)
        cluster.add_node(num_cpus=1, num_gpus=1, env_vars=dict(env_vars or {}))


@pytest.fixture(scope="module")
def skewed() -> Iterator[Cluster]:
    """A head whose clock is right, where nothing but the driver fits, and two nodes whose clocks are not."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "memory": 1})
    try:
        for off_s in BOTH:
            add_node(cluster, off_s)
        yield cluster
    finally:
        cluster.shutdown()


def skews(cluster: Cluster) -> list[float]:
    """What the clocks of the nodes with a GPU say, less ours."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from lora_search.sweep.cluster import cluster as connected
    from lora_search.sweep.cluster import nodes

    with connected(cluster.address):
        clock = ray.remote(num_cpus=0)(lambda: time.time())
        places = [NodeAffinitySchedulingStrategy(node.id, soft=False) for node in nodes() if node.gpus]
        said = ray.get([clock.options(scheduling_strategy=place).remote() for place in places])
        return sorted(one - time.time() for one in said)


class Bystanders(Observer):
    """Look at the sweep while it runs, and try to take it over, from machines whose clocks are off."""

    def __init__(self, run: RunDirectory, sweep: Path) -> None:
        self._run, self._sweep = run, sweep
        self.told: list[str] = []
        self.refused: list[tuple[int, str]] = []
        self.resumed = 0

    def trial_reported(self, trial: int, report: Mapping[str, Any]) -> None:
        if self.told:
            return
        for off_s in BOTH:
            self.told.append(answer(off_s, "-m", "lora_search", "status", str(self._run.path)).stdout)
            second = answer(off_s, "-m", "lora_search", "run", str(self._sweep), "--resume")
            self.refused.append((second.returncode, second.stderr))

    def trial_resumed(self, trial: int, parameters: Mapping[str, Any], step: int, damaged: Any) -> None:
        self.resumed += 1


def require_times_in_order(run: RunDirectory, began: float, ended: float) -> None:
    """In the record, the frames and the report: nothing before the sweep or after it, no step before an earlier one."""
    events = list(read_events(run.trials))
    assert all(began - 1 <= event["time"] <= ended + 1 for event in events)
    assert all(before["time"] <= after["time"] for before, after in pairwise(events))
    opened = open_run(run.path)
    assert (opened.trials["ended"] >= opened.trials["started"]).all()
    assert opened.trials["seconds"].between(0, ended - began).all()
    for _, reports in opened.reports.groupby("trial"):
        assert reports["step"].is_monotonic_increasing
        assert reports["time"].is_monotonic_increasing
        assert reports["seconds"].is_monotonic_increasing
    drawn = document(opened)
    assert all(0 <= point[0] <= ended - began + 1 for point in drawn["progress"]["reports"])
    assert drawn["progress"]["count"] == len(opened.reports)
    assert 0 <= drawn["occupancy"]["times"][-1] <= ended - began + 1
    assert {host["name"] for host in drawn["occupancy"]["hosts"]} == set(opened.trials["host"])


def sweep_of_six(tiny: Path, output: Path) -> SweepSpec:
    hosts, search = {"trials_per_host": 1}, {"trials": 6, "scheduler": {"name": "none"}}
    training = {"steps": 40, "eval_every": 10}
    return make_spec(tiny, name="clocks", hosts=hosts, search=search, training=training, output=str(output))


@pytest.mark.slow
def test_nodes_whose_clocks_are_off_change_nothing_in_a_sweep(skewed: Cluster, tiny: Path, tmp_path: Path) -> None:
    assert skews(skewed) == [pytest.approx(-OFF_S, abs=30), pytest.approx(OFF_S, abs=30)]
    spec = sweep_of_six(tiny, tmp_path)
    run = create_run(tmp_path, spec.name, exact=True)
    (tmp_path / "sweep.yaml").write_text(dump_spec(spec))
    bystanders, said = Bystanders(run, tmp_path / "sweep.yaml"), list[str]()
    began = time.time()
    outcome = run_sweep(spec, run, [bystanders], address=skewed.address, say=said.append)
    ended = time.time()

    require_whole(run, 6)
    assert {row["state"] for row in outcome.rows} == {"completed"}
    assert {row["host"] for row in outcome.rows} == {"host-0", "host-1"}
    assert not [line for line in said if "lost" in line]
    assert bystanders.resumed == 0
    require_times_in_order(run, began, ended)

    ahead, behind = bystanders.told
    assert "clocks: running, 0 of 6 trials have ended" in ahead
    assert "clocks: running, 0 of 6 trials have ended" in behind
    assert "s ago" in ahead
    assert "s ahead of this machine's clock" in behind
    for status, message in bystanders.refused:
        assert status == 2
        assert "another lora-search run is writing to it" in message


@pytest.mark.slow
def test_doctor_notes_clocks_that_are_off_and_not_a_node_that_answers_late(skewed: Cluster, tmp_path: Path) -> None:
    """The late one has just joined, and its workers take 8 s to start."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import sys, time\n'default_worker' in str(sys.orig_argv) and time.sleep(8)\n"
    )
    path = os.pathsep.join(filter(None, (str(slow), os.environ.get("PYTHONPATH"))))
    add_node(skewed, 0, {"PYTHONPATH": path})
    began = time.monotonic()
    nodes = [check for check in examine(skewed.address, str(tmp_path)) if check.what.startswith("node ")]
    assert time.monotonic() - began > 8
    assert sorted(check.state for check in nodes) == ["note", "note", "ok", "ok"], nodes
    assert sorted(skew(check) for check in nodes if check.state == "note") == [
        pytest.approx(-OFF_S, abs=30),
        pytest.approx(OFF_S, abs=30),
    ]


def skew(check: Check) -> float:
    """Seconds that a note says a clock is off."""
    return float(check.found.partition("its clock is ")[2].partition(" s off")[0])


@pytest.mark.slow
def test_sweep_that_a_machine_with_a_clock_behind_goes_on_with_keeps_its_times_in_order(
    tiny: Path, tmp_path: Path
) -> None:
    spec = make_spec(tiny, name="behind", hosts={"count": 1}, search={"trials": 2}, output=str(tmp_path))
    (tmp_path / "sweep.yaml").write_text(dump_spec(spec))
    began = time.time()
    run_sweep(spec, run := create_run(tmp_path, spec.name, exact=True))
    ended = max(event["time"] for event in read_events(run.trials))
    more = ["run", str(tmp_path / "sweep.yaml"), "--resume", "--set", "search.trials=4"]
    resumed = answer(-OFF_S, "-m", "lora_search", *more)
    assert resumed.returncode == 0, resumed.stderr
    require_whole(run, 4)
    require_times_in_order(run, began, time.time())
    assert open_run(run.path).resumed == pytest.approx(ended, abs=1e-3)  # else old hosts would be taken for new ones


def test_record_goes_on_from_its_last_line_where_the_clock_is_put_back(tmp_path: Path) -> None:
    file, said = tmp_path / "trials.jsonl", iter([1000.0, 1001.0, 401.0, 403.0])
    record = RunRecord(file, clock=lambda: next(said))
    for trial in range(4):
        record.trial_started(trial, {})
    record.close()
    again = RunRecord(file, clock=lambda: 200.0)
    again.trial_started(4, {})
    again.close()
    assert [event["time"] for event in read_events(file)] == [1000.0, 1001.0, 1001.0, 1003.0, 1003.0]
