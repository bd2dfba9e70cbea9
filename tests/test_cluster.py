"""A sweep over the nodes of a real Ray cluster, which come and go. GPUs are Ray's logical ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import make_spec
from test_faults import require_whole

from lora_search.errors import InputError
from lora_search.rundir import create_run
from lora_search.sweep import run_sweep
from lora_search.tracking import Observer

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head without GPUs and two nodes with one each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1, num_gpus=1)
    try:
        yield cluster
    finally:
        cluster.shutdown()


class Weather(Observer):
    """Kills a node, raylet and all, at the third report, and adds one at the sixth."""

    def __init__(self, nodes: Cluster) -> None:
        self._nodes = nodes
        self._reports = 0
        self.resumed: list[int] = []

    def trial_reported(self, trial: int, report: Mapping[str, Any]) -> None:
        self._reports += 1
        if self._reports == 3:
            victim = next(node for node in self._nodes.worker_nodes)
            self._nodes.remove_node(victim, allow_graceful=False)
        if self._reports == 6:
            self._nodes.add_node(num_cpus=1, num_gpus=1)

    def trial_resumed(self, trial: int, parameters: Mapping[str, Any], step: int, damaged: Any) -> None:
        self.resumed.append(step)


def test_nodes_that_leave_lose_no_trial_and_nodes_that_join_get_a_host(
    nodes: Cluster, tiny: Path, tmp_path: Path
) -> None:
    spec = make_spec(
        tiny,
        name="weather",
        hosts={"trials_per_host": 2},
        search={"trials": 12, "scheduler": {"name": "none"}},
        training={"steps": 400, "eval_every": 80},
        output=str(tmp_path),
    )
    said: list[str] = []
    weather = Weather(nodes)
    outcome = run_sweep(
        spec, create_run(tmp_path, spec.name, exact=True), [weather], address=nodes.address, say=said.append
    )
    require_whole(outcome.run, 12)
    assert {row["state"] for row in outcome.rows} == {"completed"}
    assert [line for line in said if "was lost: its node is gone" in line]
    assert weather.resumed
    assert {row["host"] for row in outcome.rows} - {"host-0", "host-1"}, said


def test_node_with_other_versions_is_an_error_before_the_sweep_starts(tiny: Path, tmp_path: Path) -> None:
    """The second node's processes find another peft first, as one whose image is out of date would."""
    from ray.cluster_utils import Cluster

    from lora_search.doctor import examine

    other = tmp_path / "other" / "peft-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9.9\n")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    try:
        cluster.add_node(num_cpus=1, num_gpus=1, env_vars={"PYTHONPATH": str(other.parent)})
        spec = make_spec(tiny, name="versions", output=str(tmp_path))
        run = create_run(tmp_path, spec.name, exact=True)
        with pytest.raises(InputError, match=r"the cluster's nodes differ: node \w+ has peft 9.9 \(here 0"):
            run_sweep(spec, run, address=cluster.address)
        assert not run.trials.exists()
        checks = {check.what: check for check in examine(cluster.address, str(tmp_path))}
        nodes = [check for what, check in checks.items() if what.startswith("node ")]
        assert sorted(check.state for check in nodes) == ["ok", "wrong"]
        assert "2 nodes, 2 GPUs" in checks["cluster"].found
        assert not list(tmp_path.glob(".doctor-*"))
    finally:
        cluster.shutdown()
