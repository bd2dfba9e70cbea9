"""Machines whose clocks are ten minutes off: libfaketime, of Debian's package of that name, sets a process's clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import make_spec
from test_faults import require_whole
from test_store import Store, server, store  # noqa: F401  # fixtures

from lora_search.doctor import examine
from lora_search.lease import LEASE, LEASE_S, leased
from lora_search.results import read_events
from lora_search.rundir import create_run
from lora_search.spec import dump_spec
from lora_search.storage import Folder
from lora_search.sweep import run_sweep
from lora_search.tracking import Observer

OFF_S = 600
BOTH = (OFF_S, -OFF_S)


def clock(off_s: int) -> dict[str, str]:
    """Of the environment of a process whose clock is so many seconds off; files keep their times."""
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not libraries:
        pytest.skip("needs libfaketime, of Debian's package faketime")
    once = dict.fromkeys(("FAKETIME_DONT_RESET", "NO_FAKE_STAT"), "1")
    return {"LD_PRELOAD": str(libraries[0]), "FAKETIME": f"{off_s:+d}s", **once}


def answer(off_s: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | clock(off_s), timeout=120)


def node_clock(off_s: int, folder: Path) -> dict[str, str]:
    """The same of a Ray node, which starts its workers without LD_PRELOAD: they start themselves once more, with it."""
    environment = clock(off_s)
    library = environment.pop("LD_PRELOAD")
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'LD_PRELOAD' not in os.environ:\n"
        f"    os.environ['LD_PRELOAD'] = {library!r}\n"
        "    os.execv(sys.executable, sys.orig_argv)\n"
    )
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return environment | {"PYTHONPATH": path}


@pytest.fixture(autouse=True)
def _clocks_are_off() -> None:
    """The tests here show nothing where the clock that they set is not set."""
    for off_s in BOTH:
        said = answer(off_s, "-c", "import time; print(time.time())").stdout
        assert abs(float(said) - time.time() - off_s) < 60


class Bystanders(Observer):
    """Look at the sweep while it runs, and try to take it over, from machines whose clocks are off."""

    def __init__(self, run: Path, sweep: Path) -> None:
        self._run, self._sweep = run, sweep
        self.statuses: list[dict[str, Any]] = []
        self.told: list[str] = []
        self.refused: list[tuple[int, str]] = []
        self.resumed = 0

    def trial_reported(self, trial: int, report: Mapping[str, Any]) -> None:
        if self.statuses:
            return
        for off_s in BOTH:
            self.told.append(answer(off_s, "-m", "lora_search", "status", str(self._run)).stdout)
            self.statuses.append(
                json.loads(answer(off_s, "-m", "lora_search", "status", str(self._run), "--json").stdout)
            )
            second = answer(off_s, "-m", "lora_search", "run", str(self._sweep), "--resume")
            self.refused.append((second.returncode, second.stderr))

    def trial_resumed(self, trial: int, parameters: Mapping[str, Any], step: int, damaged: Any) -> None:
        self.resumed += 1


@pytest.mark.slow
def test_nodes_whose_clocks_are_off_change_nothing_in_a_sweep(tiny: Path, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "memory": 1})
    try:
        for off_s in BOTH:
            cluster.add_node(num_cpus=1, num_gpus=1, env_vars=node_clock(off_s, tmp_path / "clock"))
        spec = make_spec(
            tiny,
            name="clocks",
            hosts={"trials_per_host": 1},
            search={"trials": 6, "scheduler": {"name": "none"}},
            training={"steps": 40, "eval_every": 10},
            output=str(tmp_path),
        )
        run = create_run(tmp_path, spec.name, exact=True)
        (tmp_path / "sweep.yaml").write_text(dump_spec(spec))
        bystanders, said = Bystanders(run.path, tmp_path / "sweep.yaml"), list[str]()
        began = time.time()
        outcome = run_sweep(spec, run, [bystanders], address=cluster.address, say=said.append)
        ended = time.time()

        require_whole(run, 6)
        assert {row["state"] for row in outcome.rows} == {"completed"}
        assert {row["host"] for row in outcome.rows} == {"host-0", "host-1"}
        assert not [line for line in said if "lost" in line]
        assert bystanders.resumed == 0
        assert all(began - 1 <= event["time"] <= ended + 1 for event in read_events(run.trials))
        assert all(0 < row["seconds"] < ended - began for row in outcome.rows)

        assert [status["phase"] for status in bystanders.statuses] == ["running", "running"]
        ahead, behind = bystanders.told
        assert "clocks: running, 0 of 6 trials have ended" in ahead
        assert "clocks: running, 0 of 6 trials have ended" in behind
        assert "s ago" in ahead
        assert "s ahead of this machine's clock" in behind
        for status, message in bystanders.refused:
            assert status == 2
            assert "another lora-search run is writing to it" in message

        notes = [check for check in examine(cluster.address, str(tmp_path)) if check.what.startswith("node ")]
        assert sorted(check.state for check in notes) == ["note", "note", "ok"]
        off = sorted(
            float(check.found.partition("its clock is ")[2].partition(" s off")[0])
            for check in notes[:]
            if check.state == "note"
        )
        assert off == [pytest.approx(-OFF_S, abs=30), pytest.approx(OFF_S, abs=30)]
    finally:
        cluster.shutdown()


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
