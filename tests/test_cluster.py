"""A sweep over the nodes of a real Ray cluster, which come and go. GPUs are Ray's logical ones."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import small_hub
from conftest import PATIENCE, SOON, WORDS, make_spec, processes, two_nodes, wait_until
from test_faults import SEARCH, TRIALS, Meanwhile, Strikes, compared, require_whole

from lora_search.cli.results import sweep_status
from lora_search.doctor import Check, _hosts
from lora_search.errors import HostGone, InputError
from lora_search.results import read_events, run_rows
from lora_search.rundir import RunDirectory, create_run
from lora_search.seat import SEAT_BYTES
from lora_search.spec import dump_spec
from lora_search.sweep import head
from lora_search.sweep.head import RAY_WAITS
from lora_search.sweep.run import run_sweep
from lora_search.tracking import Observer

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    with two_nodes() as nodes:
        yield nodes


GONE = ("its node is gone", "it cannot be reached any more", "its process died")
"""What is said of the host of a node that was killed, as the driver learns of the node, the connection or the process
first."""

EVERY = 48
"""Steps between two reports."""


class Weather(Observer):
    """Asks how the sweep stands at its second report; then kills a node, raylet and all, and adds one.

    It does so when each host has a trial with a checkpoint that cannot come to its end before it misses the host.
    """

    def __init__(self, nodes: Cluster, run: RunDirectory) -> None:
        self._nodes, self._run = nodes, run
        self._reports, self.reporters, self._struck = 0, 0, False
        self._on_their_way: dict[int, str] = {}
        """By trial, its host: those that have more than one report to make."""
        self.resumed: list[int] = []
        self.status: dict[str, Any] = {}
        self.hosts: list[Check] = []
        self.after: tuple[dict[str, Any], list[Check]] | None = None
        """How the sweep stands, and what doctor says of its hosts, when the first lost trial has gone on."""

    def trial_reported(self, trial: int, report: Mapping[str, Any]) -> None:
        self._reports += 1
        if report["steps_total"] - report["step"] > EVERY:
            self._on_their_way[trial] = report["host"]
        else:
            self._on_their_way.pop(trial, None)
        if self._reports == 2:
            self.reporters = len(self._on_their_way)
            self.status = sweep_status(self._run)
            self.hosts = list(_hosts())
        if self._reports >= 3 and not self._struck and {*self._on_their_way.values()} == {"host-0", "host-1"}:
            self._struck = True
            victim = next(node for node in self._nodes.worker_nodes)
            self._nodes.remove_node(victim, allow_graceful=False)
            self._nodes.add_node(num_cpus=1, num_gpus=1)

    def trial_resumed(self, trial: int, parameters: Mapping[str, Any], step: int, damaged: Any) -> None:
        self.resumed.append(step)
        if self.after is None:
            self.after = sweep_status(self._run), list(_hosts())


@pytest.mark.usefixtures("unverified_merge")
def test_nodes_that_leave_lose_no_trial_and_nodes_that_join_get_a_host(
    nodes: Cluster, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of its own below another working directory than the nodes have."""
    monkeypatch.chdir(tmp_path)
    spec = make_spec(
        tiny,
        name="weather",
        hosts={"trials_per_host": 2},
        search={"trials": 12, "scheduler": {"name": "none"}},
        training={"steps": 5 * EVERY, "eval_every": EVERY},
        output="runs",
    )
    said: list[str] = []
    run = create_run("runs", spec.name, exact=True)
    weather = Weather(nodes, run)
    outcome = run_sweep(spec, run, [weather], address=nodes.address, say=said.append)
    assert (tmp_path / "runs" / "weather" / "best" / "merged" / "config.json").is_file()
    require_whole(outcome.run, 12)
    assert {row["state"] for row in outcome.rows} == {"completed"}
    assert [line for line in said if "was lost: " in line and any(why in line for why in GONE)]
    assert any(step >= EVERY for step in weather.resumed)
    assert {row["host"] for row in outcome.rows} - {"host-0", "host-1"}, said

    status = weather.status
    assert (status["phase"], status["planned"], status["trials"]["completed"]) == ("running", 12, 0)
    assert sum(len(pack["trials"]) for pack in status["hosts"].values()) == weather.reporters
    assert all(pack["tokens_per_second"] > 0 for pack in status["hosts"].values() if pack["trials"])
    assert status["hosts"].keys() == {"host-0", "host-1"}
    assert {pack["capacity"] for pack in status["hosts"].values()} == {2}
    assert len({pack["node"] for pack in status["hosts"].values()}) == 2
    assert status["lost_hosts"] == []
    lost = sweep_status(outcome.run)["lost_hosts"][0]
    assert lost["name"] in status["hosts"]
    assert lost["node"] == status["hosts"][lost["name"]]["node"]
    assert lost["why"] in GONE
    assert weather.after is not None
    after, alive = weather.after
    assert (after["phase"], after["lost_hosts"]) == ("running", [lost])
    assert lost["name"] not in after["hosts"]
    assert alive, "the other host's at least"
    assert not [check.what for check in alive if check.state == "wrong" or check.what.endswith(lost["name"])]
    assert {check.state for check in weather.hosts} == {"ok"}
    resident = []
    for name, host in zip(("host-0", "host-1"), sorted(weather.hosts, key=lambda check: check.what), strict=True):
        assert host.what.endswith(name)
        says = re.match(rf"{name} trains trials (none|[\d, ]+) of at most 2, \d of them in the pass$", host.found)
        assert says, host.found
        resident += re.findall(r"\d+", says[1])
    assert 0 < len(resident) <= 4


@pytest.mark.slow
def test_node_that_is_killed_changes_no_bit_of_a_sequential_sweep(tiny: Path, tmp_path: Path) -> None:
    """Its raylet, the host and whatever seats are on it, twice: a new node takes its place each time."""
    host = {"count": 1, "trials_per_host": 1, "cpus_per_host": 1, "wait_s": 60}
    killed: list[str] = []

    def kill_node() -> None:
        (host,) = processes("ray::Host")
        raylet = next(parent for parent in psutil.Process(host).parents() if "raylet" in parent.name())
        victims = [raylet, *raylet.children(recursive=True)]
        killed.extend(" ".join(victim.cmdline()) for victim in victims)
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        nodes.add_node(num_cpus=1, num_gpus=1)

    rows, resumed = [], []
    with two_nodes(memory=1, _system_config=SOON) as nodes:
        for name, strikes in (("alone", Strikes({})), ("struck", Strikes({(0, 4): kill_node, (2, 2): kill_node}))):
            spec = make_spec(tiny, name=name, hosts=host, search=SEARCH, output=str(tmp_path))
            run = create_run(tmp_path, name, exact=True)
            rows.append(compared(run_sweep(spec, run, [strikes], address=nodes.address).rows))
            require_whole(run, TRIALS)
            resumed.append(strikes.resumed)
    assert sum(title.startswith("ray::Host") for title in killed) == 2
    assert resumed == [[], [(0, 4, 0), (2, 2, 0)]]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_sweep_that_loses_a_node_for_good_goes_on_with_the_other_and_is_resumed_on_it_alone(
    nodes: Cluster, tiny: Path, tmp_path: Path
) -> None:
    """Nothing comes in its place, neither while the sweep runs nor as it is resumed."""
    training, search = {"steps": 12 * EVERY, "eval_every": EVERY}, {"trials": 8, "scheduler": {"name": "none"}}
    spec = make_spec(
        tiny, name="smaller", hosts={"trials_per_host": 2}, training=training, search=search, output=str(tmp_path)
    )
    (tmp_path / "sweep.yaml").write_text(dump_spec(spec))
    run = RunDirectory(tmp_path / "smaller")
    command = [sys.executable, "-m", "lora_search", "run", str(tmp_path / "sweep.yaml"), "--address", nodes.address]

    def events(name: str) -> list[Mapping[str, Any]]:
        return [event for event in read_events(run.trials) if event["event"] == name] if run.trials.exists() else []

    def on_both() -> bool:
        return len({event["host"] for event in events("report")}) == 2

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as driver:
        wait_until(on_both, driver)
        nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        wait_until(lambda: bool(events("resume")), driver)
        before = len(events("report"))
        wait_until(lambda: len(events("report")) > before and bool(sweep_status(run)["lost_hosts"]), driver)
        driver.send_signal(signal.SIGTERM)
        _, said = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 130, said
    (lost,) = sweep_status(run)["lost_hosts"]
    assert lost["why"] in GONE
    first = len(events("resume"))

    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=3 * PATIENCE)
    assert again.returncode == 0, again.stderr
    require_whole(run, 8)
    assert {row["state"] for row in run_rows(run)} == {"completed"}
    assert len(events("resume")) > first
    (host,) = json.loads(run.provenance.read_text())["hosts"]
    assert host["node"] != lost["node"]


@pytest.mark.slow
@pytest.mark.usefixtures("unverified_merge")
def test_slow_node_loses_no_trial_and_gets_less_work(nodes: Cluster, tiny: Path, tmp_path: Path) -> None:
    """Its raylet, its host and the seats on it stand still nine tenths of the time."""
    held_up: Counter[str] = Counter()

    def hold_up(over: threading.Event) -> None:
        facts = json.loads(run.provenance.read_text())
        (host,) = (host["pid"] for host in facts["hosts"] if host["name"] == "host-1")
        raylet = next(parent for parent in psutil.Process(host).parents() if "raylet" in parent.name())
        while not over.is_set():
            node = [raylet, *raylet.children(recursive=True)]
            for number, wait_s in ((signal.SIGSTOP, 0.45), (signal.SIGCONT, 0.05)):
                for process in node:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(number)
                time.sleep(wait_s)
            held_up.update("host" if process.pid == host else "other" for process in node)

    training, search = {"steps": 4 * EVERY, "eval_every": 2 * EVERY}, {"trials": 10, "scheduler": {"name": "none"}}
    spec = make_spec(
        tiny, name="slow", hosts={"trials_per_host": 1}, training=training, search=search, output=str(tmp_path)
    )
    run = create_run(tmp_path, spec.name, exact=True)
    said: list[str] = []
    outcome = run_sweep(spec, run, [Meanwhile(hold_up)], address=nodes.address, say=said.append)
    require_whole(run, 10)
    assert held_up["host"] > 5
    assert held_up["other"] > held_up["host"]
    assert not [line for line in said if "was lost" in line or "starts on node" in line], said
    assert not [event for event in read_events(run.trials) if event["event"] == "resume"]
    assert {row["state"] for row in outcome.rows} == {"completed"}
    work = Counter(row["host"] for row in outcome.rows)
    assert 0 < work["host-1"] < work["host-0"], work


@pytest.mark.slow
def test_answer_that_went_with_its_node_is_a_lost_host(nodes: Cluster, tiny: Path, tmp_path: Path) -> None:
    """A snapshot lies in the memory of the node that made it until the seat has it."""
    import ray

    from lora_search.seat import Seat
    from lora_search.sweep.cluster import on_node

    ray.init(address=nodes.address, logging_level="ERROR")
    victim = next(iter(nodes.worker_nodes))
    large = ray.remote(num_cpus=0, max_retries=0)(lambda: bytes(64 << 20))
    answer = large.options(scheduling_strategy=on_node(victim.node_id)).remote()
    ray.wait([answer], fetch_local=False)
    nodes.remove_node(victim, allow_graceful=False)
    report = ray.put({"step": 1})
    host = SimpleNamespace(
        advance=SimpleNamespace(remote=lambda *given: report), snapshot=SimpleNamespace(remote=lambda *given: answer)
    )
    spec = make_spec(tiny, name="gone", output=str(tmp_path))
    first = {"trial": 0, "params": {"rank": 4, "learning_rate": 1e-3}, "attempt": 0, "again": False, "alone": False}
    run = create_run(tmp_path, "gone", exact=True)
    run.spec.touch()
    seat = Seat(first, spec, run.folder, "lora-search-gone-")
    seat._host = host  # type: ignore[assignment]
    try:
        with pytest.raises(HostGone, match="its node is gone"):
            seat.train()
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_machine_that_is_warned_has_its_trials_saved_where_they_stand(tiny: Path, tmp_path: Path) -> None:
    """SIGTERM to `ray start --block`, as Kubernetes, Slurm and systemd send it; another machine takes its place."""
    from ray.cluster_utils import Cluster

    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--num-gpus=1", "--block"]
    said: list[str] = []
    host = {"trials_per_host": 1, "wait_s": 60, "max_retries": 0}  # a trial that was kept has not failed
    training, search = {"steps": 3000, "eval_every": 1500}, {"trials": 1, "scheduler": {"name": "none"}}
    spec = make_spec(tiny, name="warned", hosts=host, training=training, search=search, output=str(tmp_path))
    run = create_run(tmp_path, spec.name, exact=True)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "memory": 1})
    machine = subprocess.Popen([*start, f"--address={nodes.address}"], stdout=subprocess.DEVNULL)

    class Warns(Strikes):
        at = math.inf

        def tick(self) -> None:
            if time.monotonic() > self.at:
                self.at = math.inf
                machine.send_signal(signal.SIGTERM)
                nodes.add_node(num_cpus=1, num_gpus=1)

    def soon() -> None:
        strikes.at = time.monotonic() + 0.5  # by then it trains for the next report

    try:
        strikes = Warns({(0, 1500): soon})
        run_sweep(spec, run, [strikes], address=nodes.address, say=said.append)
        machine.wait(PATIENCE)
    finally:
        nodes.shutdown()
        machine.kill()
    require_whole(run, 1)
    assert "host-0 was lost: its node is to go; its trials go on elsewhere from their last checkpoints" in said
    ((trial, step, damaged),) = strikes.resumed
    assert (trial, damaged) == (0, 0)
    assert 1500 < step < 3000


@pytest.mark.slow
def test_node_that_can_no_longer_write_loses_its_seats_and_the_sweep_none_of_its_trials(
    tiny: Path, tmp_path: Path
) -> None:
    """Its mount turns read-only, as a file server does to a machine that it has thrown out. Its host trains on."""
    from ray.cluster_utils import Cluster

    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the right to make mount namespaces, and util-linux")
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--num-gpus=1", "--block"]
    training, search = {"steps": 120, "eval_every": 24}, {"trials": 8, "scheduler": {"name": "none"}}
    hosts = {"count": 2, "trials_per_host": 2, "wait_s": 60}
    spec = make_spec(tiny, name="thrown", hosts=hosts, training=training, search=search, output=str(tmp_path))
    run = create_run(tmp_path, spec.name, exact=True)
    head = {"num_cpus": 1, "num_gpus": 1, "memory": 3 * SEAT_BYTES}  # more than its host holds; one sits elsewhere
    nodes = Cluster(initialize_head=True, head_node_args=head)
    first = nodes.head_node.node_id
    command = ["unshare", "--mount", *start, f"--address={nodes.address}"]
    machine = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    said: list[str] = []

    def throw_out() -> None:
        there = ["nsenter", "--mount", f"--target={machine.pid}", "mount"]
        for what in (["--bind", str(tmp_path), str(tmp_path)], ["-o", "remount,bind,ro", str(tmp_path)]):
            subprocess.run([*there, *what], check=True)

    try:
        strikes = Strikes({(0, 24): throw_out})
        rows = run_sweep(spec, run, [strikes], address=nodes.address, say=said.append).rows
    finally:
        nodes.shutdown()
        machine.kill()
    require_whole(run, 8)
    assert {row["state"] for row in rows} == {"completed"}
    (warning,) = {line for line in said if "cannot use the run directory" in line and "go on elsewhere" in line}
    (node,) = re.findall(r"WARNING: node (\w+) cannot use the run directory: .*Read-only file system", warning)
    assert node != first[:8]
    assert strikes.resumed
    assert {row["host"] for row in rows} == {"host-0", "host-1"}
    assert not [line for line in said if "was lost" in line]


COLLECTED = """
import gc, threading, time
import ray
from lora_search.sweep.cluster import cluster

def collect():
    while True:
        if pool:
            pool.pop()
        if gc.isenabled():
            gc.collect()
        time.sleep(0.001)

with cluster(None):
    pool = []
    for _ in range(1000):
        circle = [ray.put(1)]
        circle.append(circle)
        pool.append(circle)
    del circle
    threading.Thread(target=collect, daemon=True).start()
print("came to its end")
"""


def test_garbage_of_other_threads_does_not_end_the_driver_while_ray_ends() -> None:
    """Each of a thousand references is freed by the first collection after it was let go, whenever that is."""
    answer = subprocess.run([sys.executable, "-c", COLLECTED], capture_output=True, text=True, timeout=PATIENCE)
    assert answer.stdout.endswith("came to its end\n"), answer.stderr


def with_other_peft(folder: Path) -> str:
    """A path on which Python finds another peft, as on a machine whose image is out of date."""
    other = folder / "other" / "peft-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9.9\n")
    return str(other.parent)


def without_us(folder: Path) -> str:
    """A path on which Python finds that lora-search is not installed."""
    (folder / "other").mkdir()
    (folder / "other" / "sitecustomize.py").write_text(
        "import sys\n\n\nclass Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'lora_search':\n"
        "            raise ModuleNotFoundError('No module named lora_search')\n\n\n"
        "sys.meta_path.insert(0, Without())\n"
    )
    return str(folder / "other")


@pytest.mark.parametrize(
    ("gpus", "other", "differs"),
    [
        (1, with_other_peft, r"node \w+ has peft 9.9 \(here 0[^)]+\)"),
        (0, with_other_peft, r"node \w+ has peft 9.9 \(here 0[^)]+\)"),
        (1, without_us, r"node \w+: no host can be made there: ModuleNotFoundError: No module named lora_search"),
    ],
    ids=["of a host", "of seats alone", "without lora-search"],
)
def test_node_with_other_versions_is_an_error_before_the_sweep_starts(
    tiny: Path, tmp_path: Path, gpus: int, other: Callable[[Path], str], differs: str
) -> None:
    from ray.cluster_utils import Cluster

    from lora_search.doctor import examine

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    try:
        cluster.add_node(num_cpus=1, num_gpus=gpus, env_vars={"PYTHONPATH": other(tmp_path)})
        spec = make_spec(tiny, name="versions", output=str(tmp_path))
        run = create_run(tmp_path, spec.name, exact=True)
        with pytest.raises(InputError, match=f"^the cluster's nodes differ: {differs}; install the same [^\n]+$"):
            run_sweep(spec, run, address=cluster.address)
        assert not run.trials.exists()
        checks = {check.what: check for check in examine(cluster.address, str(tmp_path))}
        nodes = [check for what, check in checks.items() if what.startswith("node ")]
        assert sorted(check.state for check in nodes) == ["ok", "wrong"]
        assert f"2 nodes, {1 + gpus} GPUs" in checks["cluster"].found
        assert not list(tmp_path.glob(".doctor-*"))
    finally:
        cluster.shutdown()


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a wire between them, 10.77.0.1 and 10.77.0.2: machines, as far as Ray can see."""
    names = (f"lora-a-{os.getpid()}", f"lora-b-{os.getpid()}")
    wire = (f"va{os.getpid()}", f"vb{os.getpid()}")
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add {wire[0]} type veth peer name {wire[1]}"]
    for index, (name, end) in enumerate(zip(names, wire, strict=True), start=1):
        commands += [f"ip link set {end} netns {name}", f"ip -n {name} addr add 10.77.0.{index}/24 dev {end}"]
        commands += [f"ip -n {name} link set {end} up", f"ip -n {name} link set lo up"]
    try:
        for command in commands:
            if shutil.which("ip") is None or subprocess.run(command.split(), capture_output=True).returncode != 0:
                pytest.skip("needs the right to make network namespaces, and iproute2")
        yield names
    finally:
        for name in names:
            for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def short_folder() -> Iterator[str]:
    """For Ray's sockets, whose names may not be long."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.slow
def test_sweep_whose_head_is_lost_ends_with_a_word_and_goes_on_in_another_cluster(
    short_folder: str, namespaces: tuple[str, str], tiny: Path, tmp_path: Path
) -> None:
    """The head's GCS and raylet, with seats on them, while the driver and the host are on another machine."""
    first, second = namespaces
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), RAY_WAITS: "30"}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
    head = ["--head", "--node-ip-address=10.77.0.1", "--port=6380", "--include-dashboard=false", "--num-gpus=0"]
    worker = ["--address=10.77.0.1:6380", "--node-ip-address=10.77.0.2", "--num-cpus=2", "--num-gpus=1"]

    def inside(namespace: str, *command: str) -> subprocess.Popen[str]:
        whole = ["ip", "netns", "exec", namespace, *command]
        return subprocess.Popen(whole, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)

    def begin(folder: str) -> None:
        for namespace, node in ((first, [*head, f"--temp-dir={short_folder}/{folder}"]), (second, worker)):
            with inside(namespace, *start, *node) as started:
                _, said = started.communicate(timeout=PATIENCE)
            assert started.returncode == 0, said

    def kill_all(namespace: str) -> None:
        pids = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    training, search = {"steps": 400, "eval_every": 50}, {"trials": 4, "scheduler": {"name": "none"}}
    spec = make_spec(
        tiny, name="headless", hosts={"trials_per_host": 2}, training=training, search=search, output=str(tmp_path)
    )
    (tmp_path / "sweep.yaml").write_text(dump_spec(spec))
    run = RunDirectory(tmp_path / "headless")
    command = [sys.executable, "-m", "lora_search", "run", str(tmp_path / "sweep.yaml"), "--address", "10.77.0.1:6380"]
    begin("one")
    with inside(second, *command) as driver:
        wait_until(lambda: run.trials.exists() and run.trials.read_text().count('"event": "checkpoint"') >= 4, driver)
        kill_all(first)
        _, said = driver.communicate(timeout=50)  # Ray would have ended it by 60
    assert driver.returncode == 1, said
    last = said.splitlines()[-1]
    assert last.startswith("lora-search: the Ray cluster's head has been out of reach for 5 s; the sweep is in "), said
    assert f"{run.path}, and the same command with --resume goes on" in last
    kill_all(second)

    begin("two")
    with inside(second, *command, "--resume") as driver:
        _, said = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, said
    require_whole(run, 4)
    resumed = [event["step"] for event in read_events(run.trials) if event["event"] == "resume"]
    assert len(resumed) == 2
    assert min(resumed) >= 50


def test_head_that_is_reached_again_in_time_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the sweep's own standing still, after which the head is not reached once."""
    reached, said, finished = [True, False, False, True, False, True], list[str](), threading.Event()
    now = itertools.count(step=7.0)  # seconds between two looks at the clock: two failures are not yet 10 apart

    def is_reached() -> bool:
        if not reached:
            finished.set()
            return True
        return reached.pop(0)

    monkeypatch.setenv(RAY_WAITS, "35")
    monkeypatch.setattr(head, "ASK_EVERY_S", 0.001)
    monkeypatch.setattr(head, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(head, "_is_reached", is_reached)
    monkeypatch.setattr(head, "_end", said.append)
    with head.ended_without_head("runs/a"):
        assert finished.wait(PATIENCE)
        assert said == []
        finished.clear()
        reached += [False, False, False]
        assert finished.wait(PATIENCE)
    assert said == [
        "the Ray cluster's head has been out of reach for 10 s; the sweep is in runs/a, and the same command with "
        "--resume goes on when there is a cluster again"
    ]


REACHED = """
import psutil
from lora_search.sweep import head
from lora_search.sweep.cluster import cluster
head.ANSWER_S = 1.0
with cluster(None):
    gcs = next(child for child in psutil.Process().children(recursive=True) if child.name() == "gcs_server")
    for happens in (gcs.cpu_times, gcs.suspend, gcs.resume, gcs.kill):
        happens()
        print(head._is_reached())
"""


@pytest.mark.slow
def test_head_that_is_slow_to_answer_is_not_out_of_reach() -> None:
    answer = subprocess.run([sys.executable, "-c", REACHED], capture_output=True, text=True, timeout=PATIENCE)
    assert answer.stdout.split() == ["True", "True", "True", "False"], answer.stderr


@pytest.fixture
def hub(namespaces: tuple[str, str], tiny: Path, tmp_path: Path) -> Iterator[Path]:
    """A model hub on the first machine, port 8765, with somebody/tiny and somebody/words; the list of what it sends."""
    root, sent = tmp_path / "hub", tmp_path / "sent.txt"
    shutil.copytree(tiny / "model", root / "somebody" / "tiny")
    (root / "somebody" / "words").mkdir()
    lines = (tiny / "data.jsonl").read_text().splitlines() * 200
    draw = random.Random(0)
    with (root / "somebody" / "words" / "data.jsonl").open("w") as file:
        for line in lines:
            longer = " ".join(draw.choices(WORDS, k=25))
            file.write(json.dumps({**json.loads(line), "prompt": longer, "completion": longer}) + "\n")
    command = ["ip", "netns", "exec", namespaces[0], sys.executable, str(Path(small_hub.__file__))]
    with subprocess.Popen([*command, "10.77.0.1", "8765", str(root), str(sent)]) as process:
        yield sent
        process.kill()


STORE = "endpoint_override=10.77.0.1:9000&scheme=http"


@pytest.fixture
def bucket(namespaces: tuple[str, str]) -> Iterator[str]:
    """A bucket of an S3 server on the first machine."""
    pytest.importorskip("moto.server", reason="needs moto and flask, of the extra `dev`, for an S3 server")
    code = (
        "import time; from moto.server import ThreadedMotoServer as Server; from pyarrow.fs import S3FileSystem as S3\n"
    )
    code += "Server('10.77.0.1', 9000, verbose=False).start()\n"
    code += "S3(endpoint_override='10.77.0.1:9000', scheme='http', allow_bucket_creation=True).create_dir('runs')\n"
    code += "print('is there', flush=True); time.sleep(3600)"
    command = ["ip", "netns", "exec", namespaces[0], sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | KEYS) as process:
        assert process.stdout
        assert any(line == b"is there\n" for line in process.stdout)
        yield f"s3://runs?{STORE}"
        process.kill()


KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}


def crossed(namespace: str) -> int:
    """Bytes that have gone over a namespace's wire, either way."""
    read = ["ip", "netns", "exec", namespace, "cat", "/proc/net/dev"]
    lines = subprocess.run(read, capture_output=True, text=True, check=True).stdout.splitlines()
    received, *_, sent = next(line.split(":")[1].split()[:9] for line in lines if line.strip().startswith("v"))
    return int(received) + int(sent)


@pytest.mark.slow
def test_sweep_over_machines_of_their_own_network(
    short_folder: str, namespaces: tuple[str, str], hub: Path, bucket: str, tiny: Path, tmp_path: Path
) -> None:
    """`ray start` on each, two hosts a machine, the sweep from the command line on the first.

    The base comes to each machine once, and the data: not once a host, not once a trial. A second sweep has its run
    directory in a bucket, to which both machines write.
    """
    first, second = namespaces
    environment = os.environ | KEYS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment |= {"HF_ENDPOINT": "http://10.77.0.1:8765", "HF_HUB_DISABLE_TELEMETRY": "1"}
    caches = [environment | {"HF_HOME": str(tmp_path / name)} for name in ("first", "second")]
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=2", "--num-gpus=2"]
    start += ["--disable-usage-stats"]
    head = ["--head", "--node-ip-address=10.77.0.1", "--port=6380", "--include-dashboard=false"]
    head += [f"--temp-dir={short_folder}"]
    worker = ["--address=10.77.0.1:6380", "--node-ip-address=10.77.0.2"]
    long = {"steps": 200, "eval_every": 50}  # a trial is not over before the next looks for a host
    spec = make_spec(
        tiny,
        name="machines",
        base={"model": "somebody/tiny"},
        data={"path": "somebody/words", "max_length": 64, "validation": 0.001, "test": 0.001},
        hosts={"trials_per_host": 1},
        training=long,
        output=str(tmp_path),
    )
    (tmp_path / "sweep.yaml").write_text(dump_spec(spec))
    run = [sys.executable, "-m", "lora_search", "run", str(tmp_path / "sweep.yaml"), "--address", "10.77.0.1:6380"]
    before = 0
    for namespace, command, there in (
        (first, start + head, caches[0]),
        (second, start + worker, caches[1]),
        (first, run, caches[0]),
    ):
        before = crossed(first)
        answer = subprocess.run(
            ["ip", "netns", "exec", namespace, *command], capture_output=True, text=True, env=there, timeout=PATIENCE
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
    moved = crossed(first) - before
    directory = RunDirectory(tmp_path / "machines")
    require_whole(directory, spec.search.trials)
    assert {row["host"] for row in run_rows(directory)} == {f"host-{number}" for number in range(4)}
    assert "trial" in answer.stdout
    sent = Counter(hub.read_text().splitlines())
    print(f"{moved:,} bytes over the wire; sent by the hub: {dict(sent)}")
    assert set(sent.values()) == {1}
    machines = {file: [line.split()[0] for line in sent if line.endswith(file)] for file in ("safetensors", "jsonl")}
    assert sorted(machines["safetensors"]) == ["10.77.0.1", "10.77.0.2"]
    assert len(machines["jsonl"]) == 1
    # To the other machine the data goes as tokens, of four bytes each and one of a mask.
    facts = json.loads(directory.provenance.read_text())
    assert len(facts["base"]["fingerprint"]) == 64  # of what both machines have in their caches
    data = 5 * facts["data"]["train_tokens"]
    files = [line.split()[1:] for line in sent if line.startswith("10.77.0.2")]
    from_hub = sum((tmp_path / "hub" / repository / file).stat().st_size for repository, file in files)
    assert data < moved - from_hub < 1.5 * data

    stored = [*run, "--name", "stored", "--set", f"output={bucket}"]
    fetch = (
        "from pyarrow.fs import FileSystem, copy_files; import sys; store, path = FileSystem.from_uri(sys.argv[1])\n"
    )
    fetch += "copy_files(path, sys.argv[2], source_filesystem=store)"
    copy = [sys.executable, "-c", fetch, f"s3://runs/stored?{STORE}", str(tmp_path / "stored")]
    for command in (stored, copy):
        answer = subprocess.run(
            ["ip", "netns", "exec", first, *command], capture_output=True, text=True, env=caches[0], timeout=PATIENCE
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
    directory = RunDirectory(tmp_path / "stored")
    require_whole(directory, spec.search.trials)
    assert {row["host"] for row in run_rows(directory)} == {f"host-{number}" for number in range(4)}
    assert (directory.best / "merged" / "model.safetensors").is_file()

    unmarked = {name: value for name, value in environment.items() if name != "RAY_AUTH_MODE"}
    stranger = subprocess.run(
        ["ip", "netns", "exec", first, *run, "--name", "stranger"],
        capture_output=True,
        text=True,
        env=unmarked | {"RAY_NUM_REDIS_GET_RETRIES": "2"},
        timeout=PATIENCE,
    )
    assert stranger.returncode == 1
    assert "no Ray cluster answers at 10.77.0.1:6380" in stranger.stderr
    assert "set RAY_AUTH_MODE=token" in stranger.stderr


@pytest.fixture
def autoscaled(short_folder: str) -> Iterator[tuple[str, dict[str, str]]]:
    """A head without GPUs, and Ray's own autoscaler, which starts up to two nodes with a GPU each on this machine."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_TYPE

    kinds = {
        FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    config = {"cluster_name": "fake", "max_workers": 2, "provider": {}, "auth": {}}
    config["provider"] = {"type": "fake_multinode", "gcs_address": "127.0.0.1:6391", "use_node_id_as_ip": True}
    config["provider"] |= {"disable_node_updaters": True, "disable_launch_config_check": True}
    config |= {"available_node_types": kinds, "head_node_type": FAKE_HEAD_NODE_TYPE, "idle_timeout_minutes": 0.05}
    lists = ("file_mounts_sync_files", "initialization_commands", "setup_commands", "head_setup_commands")
    lists += ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    config |= {name: [] for name in lists} | {"file_mounts": {}, "cluster_synced_files": []}
    file = Path(short_folder) / "autoscaling.yaml"
    file.write_text(json.dumps(config))
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    start = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--port=6391",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=1",
        "--num-gpus=0",
    ]
    start += [f"--autoscaling-config={file}", f"--temp-dir={short_folder}", "--include-dashboard=false"]
    answer = subprocess.run([*start, "--disable-usage-stats"], capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    try:
        yield "127.0.0.1:6391", environment
    finally:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(short_folder in part or "6391" in part for part in process.cmdline()):
                    process.kill()


@pytest.mark.slow
def test_cluster_that_grows_is_asked_for_hosts_and_let_go(
    autoscaled: tuple[str, dict[str, str]], tiny: Path, tmp_path: Path
) -> None:
    address, environment = autoscaled
    hosts = {"count": 2, "trials_per_host": 2, "wait_s": 60}  # more than the head has cores for
    spec = make_spec(tiny, name="grown", hosts=hosts, training={"steps": 60, "eval_every": 10}, output=str(tmp_path))
    (tmp_path / "sweep.yaml").write_text(dump_spec(spec))
    run = [sys.executable, "-m", "lora_search", "run", str(tmp_path / "sweep.yaml"), "--address", address]
    answer = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    require_whole(RunDirectory(tmp_path / "grown"), spec.search.trials)
    alive = "import ray; ray.init(address='auto', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    deadline = time.monotonic() + 60
    while (
        subprocess.run(
            [sys.executable, "-c", alive.replace("auto", address)], capture_output=True, text=True, env=environment
        ).stdout.strip()
        != "1"
    ):
        assert time.monotonic() < deadline
