"""Where hosts go: one a GPU over every GPU of the cluster, one a group of cores where there is none."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import make_spec

from lora_search.errors import InputError, SweepError
from lora_search.placement import HostPlace, Node, missing_hosts, most_trials, place_hosts
from lora_search.rundir import create_run
from lora_search.spec import Hosts
from lora_search.sweep.cluster import asked_of_autoscaler
from lora_search.sweep.run import run_sweep

CASES: list[tuple[str, list[Node], dict[str, Any], list[tuple[str, int, int]]]] = [
    ("laptop", [Node("a", 2, 0)], {}, [("a", 1, 0), ("a", 1, 0)]),
    ("eight cores", [Node("a", 8, 0)], {}, [("a", 2, 0)] * 4),
    ("one host of all cores", [Node("a", 8, 0)], {"count": 1}, [("a", 8, 0)]),
    ("cores as told", [Node("a", 2, 0)], {"count": 2}, [("a", 1, 0), ("a", 1, 0)]),
    ("cores of a host as told", [Node("a", 6, 0)], {"cpus_per_host": 3}, [("a", 3, 0), ("a", 3, 0)]),
    ("one GPU", [Node("a", 16, 1)], {}, [("a", 16, 1)]),
    ("two GPU machines", [Node("a", 8, 2), Node("b", 4, 1)], {}, [("a", 4, 1), ("a", 4, 1), ("b", 4, 1)]),
    ("head without GPU", [Node("head", 8, 0), Node("b", 8, 2)], {}, [("b", 4, 1), ("b", 4, 1)]),
    ("two GPUs a host", [Node("a", 8, 4)], {"gpus_per_host": 2}, [("a", 4, 2), ("a", 4, 2)]),
    ("fewer than there are", [Node("a", 8, 4)], {"count": 1}, [("a", 2, 1)]),
    ("fewer cores than GPUs", [Node("a", 1, 2)], {}, [("a", 0, 1), ("a", 0, 1)]),
    ("GPUs left alone", [Node("a", 2, 1)], {"gpus_per_host": 0}, [("a", 1, 0), ("a", 1, 0)]),
]


@pytest.mark.parametrize(("nodes", "hosts", "places"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_hosts_are_placed(nodes: list[Node], hosts: dict[str, Any], places: list[tuple[str, int, int]]) -> None:
    placed = place_hosts(nodes, Hosts(**hosts))
    assert [(place.node, place.cpus, place.gpus) for place in placed] == places
    assert [place.name for place in placed] == [f"host-{index}" for index in range(len(places))]


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ([Node("a", 2, 0)], {"count": 3}),
        ([Node("a", 8, 1)], {"gpus_per_host": 2}),
        ([Node("a", 8, 2)], {"count": 3}),
        ([Node("a", 4, 2)], {"count": 2, "cpus_per_host": 3}),
        ([], {}),
    ],
)
def test_too_small_a_cluster_is_said(nodes: list[Node], hosts: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"hosts.count: .* has room for"):
        place_hosts(nodes, Hosts(**hosts))


def test_node_that_joins_or_leaves_changes_nothing_but_its_own_hosts() -> None:
    def starts(before: list[Node], lost: str, now: list[Node], **hosts: Any) -> list[tuple[str, int, int]]:
        running = [place for place in place_hosts(before, Hosts(**hosts)) if place.node not in lost]
        return [(place.node, place.cpus, place.gpus) for place in missing_hosts(now, Hosts(**hosts), running)]

    a, b, c = (Node(name, 8, 0) for name in "abc")
    assert starts([a], "", [a, b]) == [("b", 2, 0)] * 4
    assert starts([a, b], "b", [a]) == []
    assert starts([a, b], "b", [a, c]) == [("c", 2, 0)] * 4
    # As many as the sweep file asks for, and on no cores that another has.
    assert starts([a], "", [a, b], count=2) == []
    assert starts([a, b], "b", [a], count=2) == []
    assert starts([a, b], "b", [a, c], count=2) == [("c", 8, 0)]
    with_gpus = [Node(name, 8, 1) for name in "abc"]
    assert starts(with_gpus[:2], "", [with_gpus[2], *with_gpus[:2]], count=2) == []
    assert starts(with_gpus, "b", [with_gpus[2], with_gpus[0]], count=2) == [("c", 8, 1)]
    assert starts(with_gpus, "abc", [], count=2) == []
    head = Node("head", 0, 0)
    assert starts([head, *with_gpus], "abc", [head]) == starts([head, *with_gpus], "abc", [head], count=2) == []


@pytest.mark.parametrize(
    ("cores", "gpus", "trials"), [(1, 0, 4), (4, 0, 16), (6, 0, 16), (16, 0, 32), (8, 1, 16), (8, 2, 32), (0, 1, 16)]
)
def test_host_has_as_many_trials_as_its_threads_or_gpus_train_well(cores: int, gpus: int, trials: int) -> None:
    assert most_trials(HostPlace("host", "a", cores, gpus), Hosts()) == trials
    assert most_trials(HostPlace("host", "a", cores, gpus), Hosts(trials_per_host=3)) == 3


@pytest.mark.parametrize(
    ("hosts", "trials", "bundles"),
    [
        ({"trials_per_host": 2}, 12, [{"GPU": 1}] * 6),
        ({"trials_per_host": 2}, 1, [{"GPU": 1}]),
        ({"trials_per_host": 4, "gpus_per_host": 2}, 5, [{"GPU": 2}] * 2),
        ({"count": 3}, 100, [{"GPU": 1}] * 3),
        ({"trials_per_host": 2, "gpus_per_host": 0}, 4, [{"CPU": 1}] * 2),
    ],
)
@pytest.mark.parametrize("ends", ["well", "in an error"])
def test_autoscaler_is_asked_for_what_the_trials_fill_and_let_go_at_the_end(
    hosts: dict[str, Any], trials: int, bundles: list[dict[str, int]], ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[dict[str, int]]] = []
    monkeypatch.setattr("lora_search.sweep.cluster.request_resources", lambda bundles: asked.append(bundles))
    with suppress(SweepError), asked_of_autoscaler(Hosts(**hosts), trials) as ask_again:
        assert asked == [bundles]
        ask_again(1)  # no more fit on a host, as it turns out
        assert asked[1] == (bundles if "count" in hosts else bundles[:1] * trials)
        if ends != "well":
            raise SweepError("all hosts were lost")
    assert asked[2:] == [[]]


@pytest.mark.slow
@pytest.mark.parametrize(("gpus_per_host", "names"), [(1, ["host-0", "host-1", "host-2"]), (2, ["host-0"])])
def test_one_host_for_each_of_rays_gpus(tiny: Path, gpus_per_host: int, names: list[str]) -> None:
    """A sweep on a cluster of two nodes with two logical GPUs and one: three hosts, of which each trains.

    Of two GPUs each there is room for one host.
    """
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 2, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1, num_gpus=1)
        search = {"trials": 6, "scheduler": {"name": "none"}}
        training = {"steps": 300, "eval_every": 100}  # long enough that no host does it all before the last has begun
        hosts = {"trials_per_host": 1, "gpus_per_host": gpus_per_host}
        spec = make_spec(tiny, name="logical-gpus", hosts=hosts, search=search, training=training)
        run = create_run(Path(spec.output), spec.name, exact=False)
        outcome = run_sweep(spec, run, address=cluster.address)
        assert [host["name"] for host in json.loads(run.provenance.read_text())["hosts"]] == names
        assert {row["host"] for row in outcome.rows} == set(names)
    finally:
        ray.shutdown()
        cluster.shutdown()
