"""Launch files are what their platforms take, hold what the sweep needs, and no secret."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from conftest import ROOT

from lora_search.cli import main
from lora_search.errors import InputError
from lora_search.launch.machines import MACHINES, NAMES, SKYPILOT, find_gpu
from lora_search.launch.size import WORKING_DAY, Size, Wishes, parse_limit, size_cluster
from lora_search.launch.template import FOLDER, MARK, Template, left_to_edit
from lora_search.plan import Plan, plan_sweep
from lora_search.results import read_events
from lora_search.rundir import RunDirectory, create_run
from lora_search.spec import load_spec, parse_spec

CLUSTER = ROOT / "cluster"
RAY_FILES = ["ray-aws.yaml", "ray-gcp.yaml", "ray-ssh.yaml"]
KUBERAY_FILES = ["kuberay-job.yaml", "kuberay-cluster.yaml"]
FILES = [*RAY_FILES, *KUBERAY_FILES, "skypilot.yaml", "slurm.sbatch"]

SWEEP = "name: Tiny.sweep\nsearch: {trials: 12}\ntracking: {wandb: {mode: disabled}}\n"
UNPLANNED = ["--nodes", "3", "--time-limit", "8h"]
"""With both, nothing is planned, which takes seconds."""


def documents(text: str) -> dict[str, Any]:
    """The objects of a Kubernetes file, by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
    return "sweep.yaml"


def launched(capsys: pytest.CaptureFixture[str], where: str, sweep: str, *options: str) -> tuple[str, str]:
    """The text of the file that `launch` writes without a plan, and its command."""
    out = Path(f"launched.{where}")
    out.unlink(missing_ok=True)
    capsys.readouterr()
    status = main(["launch", "--on", where, sweep, *UNPLANNED, "--out", str(out), *options])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return out.read_text(encoding="utf-8"), printed.out.strip()


# The templates


def test_package_holds_the_files_of_cluster() -> None:
    assert {path.name for path in FOLDER.iterdir()} >= set(FILES)
    assert all((FOLDER / name).read_bytes() == (CLUSTER / name).read_bytes() for name in FILES)


def test_only_marked_lines_are_filled_in() -> None:
    text = 'a: 1  # launch: one\nb: 2  # as it is\n  c: "x"  # launch: text\n#SBATCH --d=4  # launch: one\n'
    filled = Template(Path("t.yaml"), text).fill({"one": "7", "text": "line: 1\nline: 2\n"})
    assert filled == (
        "a: 7  # launch: one\nb: 2  # as it is\n"
        "  c: |  # launch: text\n    line: 1\n    line: 2\n#SBATCH --d=7  # launch: one\n"
    )
    assert Template(Path("t.yaml"), text).fill({"one": None, "text": None}) == text
    with pytest.raises(InputError, match=r"t.yaml:1: # launch: found 'one'; allowed here: two"):
        Template(Path("t.yaml"), text).fill({"two": "2"})


@pytest.mark.parametrize("name", FILES)
def test_no_line_is_longer_than_a_page_unless_it_is_one_value(name: str) -> None:
    lines = (CLUSTER / name).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not MARK.match(line)] == []


def test_lines_for_the_user_are_told_apart_from_comments() -> None:
    assert left_to_edit("# Edit: EDIT this\nimage: ami-EDIT  # an AMI\nb: EDITED\n") == [
        (2, "image: ami-EDIT  # an AMI")
    ]


# ray up


@pytest.mark.parametrize("name", RAY_FILES)
@pytest.mark.filterwarnings("ignore")
def test_ray_takes_the_cluster_file(name: str, sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    options = ["--template", name, "--gpu", "h100", "--gpus-per-node", "8", "--set", "output=s3://bucket/runs"]
    filled, _ = launched(capsys, "ray", sweep, *options)
    for text in ((CLUSTER / name).read_text(encoding="utf-8"), filled):
        validate_config(prepare_config(yaml.safe_load(text)))
    broken = yaml.safe_load(filled) | {"worker_nodes_count": 3}
    with pytest.raises(jsonschema.ValidationError, match="worker_nodes_count"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("name", RAY_FILES)
def test_ray_up_keeps_the_token_on_and_the_dashboard_at_home(name: str) -> None:
    config = yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))
    head = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    worker = [command for command in config["worker_start_ray_commands"] if "ray start" in command]
    assert len(head) == len(worker) == 1
    assert all(command.startswith("RAY_AUTH_MODE=token ") for command in head + worker)
    assert "--dashboard-host=127.0.0.1" in head[0]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_ray_up_rents_spot_workers_of_the_gpu_that_was_asked_for(
    sweep: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--set", "output=s3://bucket/runs"]
    text, command = launched(capsys, "ray", sweep, "--gpu", "L40S", "--gpus-per-node", "4", *output)
    config = yaml.safe_load(text)
    worker = config["available_node_types"]["worker"]
    assert worker["node_config"]["InstanceType"] == "g6e.12xlarge"
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["resources"] == {"CPU": 48, "GPU": 4}
    assert worker["min_workers"] == worker["max_workers"] == config["max_workers"] == 3
    *_, work = shlex.split(command)
    run = "timeout --preserve-status 28800 lora-search run sweep.yaml --address auto --set "
    assert work.endswith(f"; {run}{output[1]} --set hosts.wait_s=900")  # with fewer nodes too, and until they are back
    assert "--nodes 4;" in work
    _, command = launched(capsys, "ray", sweep, "--set", "hosts.wait_s=0", *output)
    assert command.count("hosts.wait_s") == command.count("hosts.wait_s=0") == 1
    assert "ray exec --tmux --stop" in command
    assert config["docker"]["worker_run_options"] == ["--gpus all"]

    text, command = launched(capsys, "ray", sweep, "--template", "ray-gcp.yaml", "--gpu", "a100-80gb", *output)
    worker = yaml.safe_load(text)["available_node_types"]["worker"]
    assert worker["node_config"]["machineType"] == "a2-ultragpu-1g"
    assert worker["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    zone = "availability_zone: us-central1-a"
    mine = (CLUSTER / "ray-gcp.yaml").read_text(encoding="utf-8").replace(zone, "availability_zone: europe-west4-b")
    Path("mine.yaml").write_text(mine, encoding="utf-8")
    for gpu, count, disk in (("l4", "1", "pd-balanced"), ("h200", "8", "hyperdisk-balanced")):
        options = ["--template", "mine.yaml", "--gpu", gpu, "--gpus-per-node", count, *output]
        worker = yaml.safe_load(launched(capsys, "ray", sweep, *options)[0])["available_node_types"]["worker"]
        (boot,) = worker["node_config"]["disks"]
        assert boot["initializeParams"]["diskType"] == f"zones/europe-west4-b/diskTypes/{disk}"


@dataclass
class Machine:
    """Answers what Ray's autoscaler asks a rented machine over SSH, and keeps what it was told to do."""

    image_env: list[str]
    ssh_user: str = "ubuntu"
    cluster_name: str = "lora-search"
    running: bool = False
    told: list[str] = field(default_factory=list)
    sent: list[tuple[str, str]] = field(default_factory=list)

    def run_rsync_up(self, source: str, target: str, options: dict[str, Any]) -> None:
        self.sent.append((source, target))

    def run(self, cmd: str, **options: Any) -> bytes:
        self.told.append(cmd)
        answers = {
            "docker inspect -f '{{json .Config.Env}}'": json.dumps(self.image_env),
            "docker inspect -f '{{.State.Running}}'": str(self.running).lower(),
            "printenv HOME": "/home/ray",
            "cat /proc/meminfo": "MemAvailable: 8000000 kB",
            "docker info": "map[nvidia:{nvidia-container-runtime}]",
            "command -v docker": "/usr/bin/docker",
        }
        return next((text for asked, text in answers.items() if asked in cmd), "").encode()


@pytest.mark.parametrize("name", ["ray-aws.yaml", "ray-gcp.yaml"])
def test_ray_mounts_its_files_in_the_home_of_the_images_user(name: str) -> None:
    from ray.autoscaler._private.command_runner import DockerCommandRunner

    dockerfile = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    environment = [part for line in re.findall(r"^ENV (.*)$", dockerfile, re.MULTILINE) for part in line.split()]
    config = yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))
    home = re.findall(r"^WORKDIR (.*)$", dockerfile, re.MULTILINE)[-1]
    last = dict(part.split("=") for part in environment)
    made = re.search(r"^RUN mkdir -p (.*)$", dockerfile, re.MULTILINE)
    assert made
    for as_head in (True, False):
        runner = DockerCommandRunner.__new__(DockerCommandRunner)  # its own beginning makes an SSH connection
        runner.ssh_command_runner = machine = Machine([f"{key}={value}" for key, value in last.items()])
        runner.container_name, runner.docker_config, runner.docker_cmd = "lora-search", config["docker"], "docker"
        runner.home_dir, runner.initialized = None, False
        runner.run_init(as_head=as_head, file_mounts=dict(config["file_mounts"]), sync_run_yet=True)
        (start,) = [command for command in machine.told if command.startswith("docker run")]
        mounted = [mount.rpartition(":")[2] for mount in re.findall(r"-v (\S+)", start)]
        assert mounted == [f"{home}/.ray/auth_token"]
        assert ("--gpus all" in start) is not as_head
    # Docker makes the folders that are missing as root's, who is not the user.
    commented = re.findall(r"^  # ~/(.*?): ~/", (CLUSTER / name).read_text(encoding="utf-8"), re.MULTILINE)
    folders = {str(Path(path).parent) for path in (*commented, ".ray/auth_token")}
    assert folders - {"."} <= set(made[1].split())


@pytest.mark.parametrize("name", RAY_FILES)
def test_sweep_that_was_edited_reaches_a_head_that_is_still_up(
    name: str, sweep: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.autoscaler._private import commands
    from ray.autoscaler._private.command_runner import DockerCommandRunner

    _, command = launched(capsys, "ray", sweep, "--template", name, "--set", "output=s3://b/runs")
    words = shlex.split(command)
    steps = [list(step) for end, step in itertools.groupby(words, lambda word: word == "&&") if not end]
    assert [step[1] for step in steps[-3:]] == ["up", "rsync-up", "exec"]
    file, *paths = steps[-2][2:]
    config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    machine: Any = Machine([], running=True)
    runner = machine
    if "docker" in config:
        runner = DockerCommandRunner.__new__(DockerCommandRunner)
        runner.ssh_command_runner, runner.container_name, runner.docker_cmd = machine, "lora-search", "docker"
        runner.home_dir, runner.initialized = None, False
    provider = SimpleNamespace(get_command_runner=lambda *arguments: runner)
    monkeypatch.setattr(commands, "_get_node_provider", lambda *arguments: provider)
    monkeypatch.setattr(commands, "_get_running_head_node", lambda *arguments, **options: "head")
    commands.rsync(file, *paths, None, down=False, should_bootstrap=False)
    ((source, target),) = machine.sent
    assert Path(source) == Path(sweep).resolve()
    if "docker" in config:  # Ray leaves a file that is mounted to Docker
        assert machine.told[-1].endswith(f"rsync -e 'docker exec -i' -avz {target} lora-search:/home/ray/sweep.yaml")
    else:
        assert target == "~/sweep.yaml"


@pytest.mark.parametrize(
    ("where", "output"), [("ray", "s3://b/runs"), ("skypilot", "s3://b/runs"), ("slurm", "/shared/runs")]
)
def test_local_files_are_found_where_the_sweep_file_lies_elsewhere(
    where: str, output: str, sweep: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path.cwd()
    (folder / "my rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    Path(sweep).write_text(SWEEP + "data: {path: my rows.jsonl}\n", encoding="utf-8")
    text, command = launched(capsys, where, sweep, "--set", f"output={output}")
    if where == "slurm":
        named = re.search(r"^sweep=(.*?)  # launch", text, re.MULTILINE)
        assert named
        (path,) = shlex.split(named[1])
        options: list[str] = []
    else:
        path = str(folder / "elsewhere.yaml")  # the copy that goes to the head
        shutil.copyfile(sweep, path)
        work = shlex.split(command)[-1] if where == "ray" else yaml.safe_load(text)["envs"]["RUN_OPTIONS"]
        words = shlex.split(work)
        options = [value for word, value in itertools.pairwise(words) if word == "--set"]
    head = folder / "head"
    head.mkdir()
    (head / "sweep.yaml").write_bytes(Path(path).read_bytes())
    monkeypatch.chdir(head)
    assert load_spec("sweep.yaml" if options else path, options).data.path == str(folder / "my rows.jsonl")


def test_machines_of_the_users_own_are_never_shut_down(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    mine = (CLUSTER / "ray-ssh.yaml").read_text(encoding="utf-8").replace("[EDIT]", "[b, c, d]").replace("EDIT", "a")
    Path("mine.yaml").write_text(mine, encoding="utf-8")
    _, command = launched(capsys, "ray", sweep, "--template", "mine.yaml", "--set", "output=/shared/runs")
    assert "--stop" not in command
    options = ["--template", "mine.yaml", "--set", "output=/shared/runs", "--time-limit", "8h"]
    status = main(["launch", "--on", "ray", sweep, *options])
    printed = capsys.readouterr()
    assert status == 0
    assert "4 nodes" in printed.err
    assert "lora_search.launch.wait --nodes 4 " in printed.out


def test_every_gpu_of_the_planner_has_a_name_everywhere() -> None:
    assert set(SKYPILOT) == set(NAMES)
    assert all(set(sold) <= set(NAMES) for sold in MACHINES.values())
    assert [find_gpu(name) for name in ("l4", "h100", "A100-80GB", "rtx4090")] == [
        "L4",
        "H100 80 GB",
        "A100 80 GB",
        "RTX 4090",
    ]


# KubeRay


def _object(fields: dict[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


STRING, INTEGER, BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
STRINGS = {"type": "object", "additionalProperties": STRING}
QUANTITY = {
    "anyOf": [
        INTEGER,
        {"type": "string", "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE])?$"},
    ]
}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}

# What Kubernetes' core/v1 and KubeRay's ray.io/v1 (ray-operator/apis/ray/v1/raycluster_types.go and rayjob_types.go,
# whose fields are those of the CRDs of v1.6) say of the fields that our files use; Kubernetes refuses any other.
_SECRET_KEY = _object({"name": STRING, "key": STRING, "optional": BOOLEAN}, ("key",))
_VALUE_FROM = _object({"secretKeyRef": _SECRET_KEY, "fieldRef": _object({"fieldPath": STRING}, ("fieldPath",))})
_ENV = _object({"name": STRING, "value": STRING, "valueFrom": _VALUE_FROM}, ("name",))
_CONTAINER = _object(
    {
        "name": STRING,
        "image": STRING,
        "workingDir": STRING,
        "env": {"type": "array", "items": _ENV},
        "resources": _object({"requests": QUANTITIES, "limits": QUANTITIES}),
        "securityContext": _object({"allowPrivilegeEscalation": BOOLEAN}),
        "volumeMounts": {
            "type": "array",
            "items": _object({"name": STRING, "mountPath": STRING, "readOnly": BOOLEAN}, ("name", "mountPath")),
        },
    },
    ("name",),
)
_VOLUME = _object(
    {
        "name": STRING,
        "configMap": _object({"name": STRING}),
        "persistentVolumeClaim": _object({"claimName": STRING}, ("claimName",)),
    },
    ("name",),
)
_POD = _object(
    {
        "containers": {"type": "array", "items": _CONTAINER, "minItems": 1},
        "volumes": {"type": "array", "items": _VOLUME},
        "securityContext": _object({"runAsNonRoot": BOOLEAN, "runAsUser": INTEGER, "fsGroup": INTEGER}),
        "restartPolicy": {"enum": ["Always", "OnFailure", "Never"]},
        "tolerations": {
            "type": "array",
            "items": _object({"key": STRING, "operator": {"enum": ["Exists", "Equal"]}, "effect": STRING}),
        },
    },
    ("containers",),
)
_TEMPLATE = _object({"spec": _POD})
RAY_CLUSTER = _object(
    {
        "rayVersion": STRING,
        "authOptions": _object({"mode": {"enum": ["disabled", "token"]}, "secretName": STRING}),
        "enableInTreeAutoscaling": BOOLEAN,
        "autoscalerOptions": _object({"version": {"enum": ["v1", "v2"]}, "idleTimeoutSeconds": INTEGER}),
        "headGroupSpec": _object({"rayStartParams": STRINGS, "template": _TEMPLATE}, ("template",)),
        "workerGroupSpecs": {
            "type": "array",
            "items": _object(
                {
                    "groupName": STRING,
                    "replicas": INTEGER,
                    "minReplicas": INTEGER,
                    "maxReplicas": INTEGER,
                    "rayStartParams": STRINGS,
                    "template": _TEMPLATE,
                },
                ("groupName", "minReplicas", "maxReplicas", "template"),
            ),
        },
    },
    ("headGroupSpec",),
)
RAY_JOB = _object(
    {
        "entrypoint": STRING,
        "activeDeadlineSeconds": INTEGER,
        "backoffLimit": INTEGER,
        "shutdownAfterJobFinishes": BOOLEAN,
        "ttlSecondsAfterFinished": INTEGER,
        "rayClusterSpec": RAY_CLUSTER,
    }
)
_LABEL = {"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}  # KubeRay's limit of a RayJob
_META = _object({"name": _LABEL}, ("name",))
KINDS = {
    "ConfigMap": _object({"apiVersion": {"const": "v1"}, "kind": STRING, "metadata": _META, "data": STRINGS}),
    "RayJob": _object({"apiVersion": {"const": "ray.io/v1"}, "kind": STRING, "metadata": _META, "spec": RAY_JOB}),
    "RayCluster": _object(
        {"apiVersion": {"const": "ray.io/v1"}, "kind": STRING, "metadata": _META, "spec": RAY_CLUSTER}
    ),
}


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_kuberay_takes_the_file(name: str, sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    filled, command = launched(capsys, "kuberay", sweep, "--template", name, "--gpus-per-node", "2")
    if name == "kuberay-cluster.yaml":
        assert command == "kubectl apply -f launched.kuberay"
        _, command = launched(capsys, "kuberay", sweep, "--template", name, "--gpus-per-node", "2", "--resume")
        assert command == "kubectl apply -f launched.kuberay"  # the cluster is there to stay
    for text in ((CLUSTER / name).read_text(encoding="utf-8"), filled):
        for kind, document in documents(text).items():
            jsonschema.validate(document, KINDS[kind])
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        jsonschema.validate(
            yaml.safe_load('{"groupName": "gpu", "replica": 1}'), RAY_CLUSTER["properties"]["workerGroupSpecs"]["items"]
        )


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_kuberay_volumes_and_versions_agree(name: str) -> None:
    ray = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert ray
    found = documents((CLUSTER / name).read_text(encoding="utf-8"))
    spec = found["RayJob"]["spec"]["rayClusterSpec"] if "RayJob" in found else found["RayCluster"]["spec"]
    assert spec["rayVersion"] == ray[1]
    assert spec["authOptions"] == {"mode": "token"}
    pods = [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    for pod in pods:
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_kuberay_gives_rays_object_store_its_shared_memory(name: str) -> None:
    found = documents((CLUSTER / name).read_text(encoding="utf-8"))
    spec = found["RayJob"]["spec"]["rayClusterSpec"] if "RayJob" in found else found["RayCluster"]["spec"]
    # KubeRay mounts /dev/shm as large as the first container's limit (ray-operator/controllers/ray/common/pod.go,
    # addEmptyDir), unless something is mounted there or the object store is put elsewhere.
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        container = group["template"]["spec"]["containers"][0]
        assert container["resources"]["limits"]["memory"]
        assert "/dev/shm" not in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert "plasma-directory" not in group["rayStartParams"]


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_kuberay_gives_a_pod_cores_by_its_gpus(name: str, sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec

    template = (CLUSTER / name).read_text(encoding="utf-8")

    def cores(gpus: int, *options: str, text: str = template) -> int:
        """What Ray's autoscaler expects of a pod, and the operator tells Ray in it: cores that it requests."""
        Path("mine.yaml").write_text(text, encoding="utf-8")
        filled = ["--template", "mine.yaml", "--gpus-per-node", str(gpus), *options]
        found = documents(launched(capsys, "kuberay", sweep, *filled)[0])
        spec = found["RayJob"]["spec"]["rayClusterSpec"] if "RayJob" in found else found["RayCluster"]["spec"]
        head, worker = spec["headGroupSpec"], spec["workerGroupSpecs"][0]
        resources = worker["template"]["spec"]["containers"][0]["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"] == "32Gi"
        assert head["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "4"  # the driver's
        expected = _get_ray_resources_from_group_spec(worker, is_head=False)
        assert expected.get("GPU", 0) == gpus
        return expected["CPU"]

    assert cores(1) == 8
    assert cores(8) == 64
    assert cores(8, "--set", "hosts.gpus_per_host=2") == 64
    assert cores(8, "--set", "hosts.gpus_per_host=2", "--set", "hosts.cpus_per_host=6") == 24
    assert cores(8, text=template.replace(" 8  # launch: cores", ' "48"')) == 48
    mine = template.replace(" 8  # launch: cores", " 48  # launch: cores")
    assert cores(0, "--set", "hosts.gpus_per_host=0", text=mine) == 48  # hosts take what cores there are


def test_kuberay_job_holds_the_sweep_with_its_paths_on_the_volume(
    sweep: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    options = ["--set", "data.path=rows.jsonl", "--set", "training.steps=33"]
    text, _ = launched(capsys, "kuberay", sweep, "--gpus-per-node", "2", "--image", "registry/lora:1", *options)
    found = documents(text)
    held = yaml.safe_load(found["ConfigMap"]["data"]["sweep.yaml"])
    assert held["data"]["path"] == "/shared/rows.jsonl"
    assert held["output"] == "/shared/runs"
    waits = "hosts.wait_s=900"  # the operator makes new pods
    expected = load_spec(sweep, [*options[1::2], "output=/shared/runs", "data.path=builtin:demo", waits])
    held["data"]["path"] = "builtin:demo"
    assert parse_spec(yaml.safe_dump(held), source="configmap", folder=Path()) == expected

    cores = documents(launched(capsys, "kuberay", sweep, "--gpus-per-node", "0", *options)[0])
    assert yaml.safe_load(cores["ConfigMap"]["data"]["sweep.yaml"])["hosts"]["wait_s"] == 0  # it would wait for a GPU

    job = found["RayJob"]["spec"]
    worker = job["rayClusterSpec"]["workerGroupSpecs"][0]
    assert [worker[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [3, 3, 3]
    assert worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert worker["template"]["spec"]["containers"][0]["image"] == "registry/lora:1"
    assert found["RayJob"]["metadata"]["name"] == found["ConfigMap"]["metadata"]["name"] == "tiny-sweep"
    volumes = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert {"name": "sweep", "configMap": {"name": "tiny-sweep"}} in volumes
    assert shlex.split(job["entrypoint"])[:3] == ["timeout", "--preserve-status", "28800"]
    assert job["activeDeadlineSeconds"] > 28800


def test_kuberay_job_takes_no_path_that_its_pods_do_not_see(
    sweep: str, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    def output(*options: str) -> str:
        text, _ = launched(capsys, "kuberay", sweep, "--gpus-per-node", "1", *options)
        return str(yaml.safe_load(documents(text)["ConfigMap"]["data"]["sweep.yaml"])["output"])

    def refused(*options: str) -> str:
        arguments = ["launch", "--on", "kuberay", sweep, *UNPLANNED, "--gpus-per-node", "1"]
        assert main([*arguments, *options]) == 2
        return capsys.readouterr().err

    assert output("--set", f"output={Path.cwd() / 'mine'}") == "/shared/mine"
    assert output("--set", "output=/shared/runs/mine") == "/shared/runs/mine"
    assert "output: found '/data/runs', which no pod sees; allowed: " in refused("--set", "output=/data/runs")
    assert "output: found '../runs', which" in refused("--set", "output=../runs")
    rows = tmp_path_factory.mktemp("outside") / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    assert f"data.path: found '{rows}', which no pod sees" in refused("--set", f"data.path={rows}")
    text = (CLUSTER / "kuberay-job.yaml").read_text(encoding="utf-8")
    Path("mine.yaml").write_text(text.replace("mountPath: /shared", f"mountPath: {rows.parent}"), encoding="utf-8")
    assert output("--template", "mine.yaml", "--set", f"output={rows.parent}/runs") == f"{rows.parent}/runs"


KUBECTL = """#!{python}
import pathlib, sys, yaml
command, *options, file = sys.argv[1:]
refused = False
for document in yaml.safe_load_all(pathlib.Path(file).read_text()):
    there = pathlib.Path("objects") / document["kind"]
    if command == "delete":
        there.unlink(missing_ok=True)
    elif there.exists() and command == "create":
        refused = True
    elif not there.exists() and "--dry-run=server" not in options:
        there.write_text(yaml.safe_dump(document))
sys.exit(refused)
"""
"""As far as our commands go: like kubectl, it makes what it can beside what it refuses, and leaves what is there."""


def test_kuberay_job_runs_the_sweep_that_was_submitted_or_is_refused(
    sweep: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects, tools = tmp_path / "objects", tmp_path / "tools"
    for folder in (objects, tools):
        folder.mkdir()
    (tools / "kubectl").write_text(KUBECTL.format(python=sys.executable), encoding="utf-8")
    (tools / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")

    def submitted(trials: int, *options: str) -> int:
        out = ["--out", f"{trials}.yaml", "--gpus-per-node", "1", "--image", "registry/lora:1"]
        overrides = ["--set", f"search.trials={trials}"]
        return main(["launch", "--on", "kuberay", sweep, *UNPLANNED, *out, *overrides, "--submit", *options])

    def runs() -> int:
        held = yaml.safe_load((objects / "ConfigMap").read_text(encoding="utf-8"))["data"]["sweep.yaml"]
        return int((objects / "RayJob").exists() and yaml.safe_load(held)["search"]["trials"])

    assert submitted(3) == 0
    assert runs() == 3
    assert submitted(4) == 1
    assert "--submit: exit status 1 of: kubectl create" in capsys.readouterr().err
    assert runs() == 3
    (objects / "RayJob").unlink()  # as `kubectl delete rayjob` does
    assert submitted(5) == 1
    assert runs() == 0
    for trials in (6, 7):
        assert submitted(trials, "--resume") == 0
        assert runs() == trials


# SkyPilot


SKYPILOT_TASK = _object(  # sky/utils/schemas.py of SkyPilot 0.14.1, as far as our file goes
    {
        "name": STRING,
        "num_nodes": INTEGER,
        "resources": _object(
            {
                "accelerators": {"type": "string", "pattern": r"^[A-Za-z0-9-]+:\d+$"},
                "image_id": {"type": "string", "pattern": "^docker:"},
                "disk_size": INTEGER,
                "use_spot": BOOLEAN,
                "autostop": _object({"idle_minutes": INTEGER, "down": BOOLEAN}),
            }
        ),
        "file_mounts": STRINGS,
        "secrets": STRINGS,
        "envs": STRINGS,
        "run": STRING,
    }
)


def test_skypilot_task_has_the_fields_of_its_schema(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    override = "search.space.rank={choice: [4, 8]}"
    options = ["--gpu", "a100-80gb", "--gpus-per-node", "8", "--set", "output=gs://b/runs", "--set", override]
    filled, command = launched(capsys, "skypilot", sweep, *options)
    for text in ((CLUSTER / "skypilot.yaml").read_text(encoding="utf-8"), filled):
        jsonschema.validate(yaml.safe_load(text), SKYPILOT_TASK)
    task = yaml.safe_load(filled)
    assert task["resources"]["accelerators"] == "A100-80GB:8"
    assert task["num_nodes"] == 3
    assert task["envs"]["LIMIT"] == str(8 * 3600)
    assert shlex.split(task["envs"]["RUN_OPTIONS"]) == ["--set", "output=gs://b/runs", "--set", override]
    assert "sky launch -y -d -c tiny-sweep" in command
    assert "RAY_AUTH_MODE=token" in task["run"]
    assert "--dashboard-host=127.0.0.1" in task["run"]
    assert not re.search(r"^\s*ray stop", task["run"], re.MULTILINE)
    # SkyPilot's subprocess_daemon ends what is left of a task's processes, of which Ray's are some at first.
    assert re.search(r"ray start --address[^#]*done\n(\s*#.*\n)*\s*sleep \d+\n\s*exit\n", task["run"])


def test_skypilot_takes_the_task(sweep: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sky = pytest.importorskip("sky", reason="needs SkyPilot: pip install skypilot==0.14.1")
    options = ["--gpu", "a100-80gb", "--gpus-per-node", "8", "--set", "output=gs://b/runs"]
    filled, _ = launched(capsys, "skypilot", sweep, *options)
    (tmp_path / "task.yaml").write_text(filled, encoding="utf-8")
    task = sky.Task.from_yaml(str(tmp_path / "task.yaml"))
    (resources,) = task.resources
    assert (task.num_nodes, resources.accelerators) == (3, {"A100-80GB": 8})
    assert task.envs["LIMIT"] == str(8 * 3600)


@pytest.fixture
def ports() -> Iterator[list[socket.socket]]:
    """Two ports of this machine, on which nobody listens yet."""
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        yield [one, other]


NOTE_JOB = 'echo "job $LORA_SEARCH_JOB" >> "$CALLED"'
"""What stands for lora-search: it notes in which job it runs."""


def skypilot_task(
    rank: int, ports: list[socket.socket], folder: Path, *, failing: str = "", patience: int = 600
) -> subprocess.Popen[str]:
    """The run script on a node, where the head's Ray and its own would listen on these ports.

    Its tools only note their arguments, and one of them fails; `sleep` ends when `called.go` is there.
    """
    tools, called = folder / "tools", folder / "called"
    tools.mkdir()
    does = {"sleep": 'until [ -e "$CALLED.go" ]; do /bin/sleep 0.05; done', "lora-search": NOTE_JOB, failing: "exit 1"}
    for name in ("ray", "python3", "lora-search", "sleep"):
        (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "$CALLED"\n{does.get(name, "")}\n', encoding="utf-8")
        (tools / name).chmod(0o755)
    called.touch()
    script = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text(encoding="utf-8"))["run"]
    script = script.replace(" 600))", f" {patience}))")
    for port, each in zip(("6379", "6378"), ports, strict=True):
        script = script.replace(port, str(each.getsockname()[1]))
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "CALLED": str(called),
        "HOME": str(folder),
        "HF_TOKEN": "",
        "WANDB_API_KEY": "",
        "LIMIT": "60",
        "RUN_OPTIONS": "--set output=s3://b/runs --resume",
        "SKYPILOT_TASK_ID": "sky-managed-1_tiny_1-0",
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2",
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "1",
    }
    return subprocess.Popen(["bash", "-c", script], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("rank", "earlier", "starts"),
    [(0, "none", True), (1, "none", True), (0, "whole", False), (1, "whole", False), (1, "headless", True)],
)
def test_skypilot_task_on_machines_that_are_still_up_takes_the_ray_that_is_there(
    rank: int, earlier: str, starts: bool, ports: list[socket.socket], tmp_path: Path
) -> None:
    head, node = ports
    number = node.getsockname()[1]
    if rank or earlier != "none":
        head.listen()
    if earlier != "none":
        node.listen()
    called = tmp_path / "called"
    task = skypilot_task(rank, ports, tmp_path)
    if earlier == "headless":  # the head has just begun anew, and the worker's Ray finds out
        while task.poll() is None and not called.read_text(encoding="utf-8"):
            time.sleep(0.05)
        node.close()
    (tmp_path / "called.go").touch()
    assert task.communicate(timeout=60)[1] == ""
    assert task.returncode == 0
    lines = called.read_text(encoding="utf-8").splitlines()
    started = {line for line in lines if line.startswith("ray ")}
    assert len(started) == starts
    assert all(line.startswith(("ray start --address", "ray start --head")[rank == 0]) for line in started)
    assert all(f"--node-manager-port={number} " in line for line in started)
    ran = [line for line in lines if line.startswith("lora-search run ")]
    assert [line.partition(" --set ")[2] for line in ran] == ["output=s3://b/runs --resume"] * (rank == 0)
    assert [line for line in lines if line.startswith("job ")] == ["job sky-managed-1_tiny_1-0"] * (rank == 0)


def test_skypilot_task_goes_on_without_a_node_that_never_comes(ports: list[socket.socket], tmp_path: Path) -> None:
    task = skypilot_task(0, ports, tmp_path, failing="python3")
    _, said = task.communicate(timeout=60)
    assert task.returncode == 0
    assert "WARNING: the sweep begins without the other nodes" in said
    assert re.findall(r"^lora-search run", (tmp_path / "called").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    ("reaches", "patience", "attempts"),
    [(True, 600, 90), (True, 0, 1), (False, 0, 0)],
    ids=["tries-again", "gives-up", "no-head"],
)
def test_skypilot_node_that_cannot_join_does_not_end_the_task(
    reaches: bool, patience: int, attempts: int, ports: list[socket.socket], tmp_path: Path
) -> None:
    """SkyPilot ends it on all nodes where it fails on one, and waits for each to end."""
    if reaches:
        ports[0].listen()
    (tmp_path / "called.go").touch()
    task = skypilot_task(1, ports, tmp_path, failing="ray", patience=patience)
    _, said = task.communicate(timeout=60)
    assert task.returncode == 0
    assert ("WARNING: 127.0.0.1 does not answer" in said) is not reaches
    assert len(re.findall(r"^ray start", (tmp_path / "called").read_text(encoding="utf-8"), re.MULTILINE)) == attempts


# Whatever the platform


@pytest.mark.parametrize("where", ["slurm", "kuberay", "ray", "skypilot"])
def test_resume_reaches_the_run(where: str, sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    ran = {
        "slurm": r"^arguments=\(.*--resume\)",
        "kuberay": r"^  entrypoint: .*lora-search run .*--resume ",
        "ray": r"lora-search run .*--resume'$",
        "skypilot": r'^  RUN_OPTIONS: ".*--resume"',
    }
    output = ["--set", "output=s3://b/runs"]
    text, command = launched(capsys, where, sweep, *output)
    assert not re.search(ran[where], f"{text}\n{command}", re.MULTILINE)
    text, command = launched(capsys, where, sweep, *output, "--resume")
    assert re.search(ran[where], f"{text}\n{command}", re.MULTILINE)


def test_launch_file_of_a_resumed_sweep_stands_beside_that_of_its_start(
    sweep: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["launch", "--on", "slurm", sweep, *UNPLANNED]
    assert main(arguments) == main([*arguments, "--resume"]) == 0
    assert {path.name for path in Path().glob("Tiny*")} == {
        "Tiny.sweep.slurm.sbatch",
        "Tiny.sweep-resume.slurm.sbatch",
    }


def test_image_of_ones_own_template_stays(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    for where, file in (("kuberay", "kuberay-job.yaml"), ("ray", "ray-gcp.yaml"), ("skypilot", "skypilot.yaml")):
        text = (CLUSTER / file).read_text(encoding="utf-8").replace("EDIT/lora-search:latest", "registry/mine:7")
        Path("mine.yaml").write_text(text, encoding="utf-8")
        options = ["--template", "mine.yaml", "--set", "output=s3://b/runs"]
        assert "registry/mine:7" in launched(capsys, where, sweep, *options)[0]
        other, _ = launched(capsys, where, sweep, *options, "--image", "registry/other:8")
        assert "registry/other:8" in other
        assert "registry/mine:7" not in other


# The image


def test_dockerfile_copies_what_is_there_and_installs_what_was_tested() -> None:
    lines = (CLUSTER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [path for line in lines if line.startswith("COPY ") for path in line.split()[1:-1]]
    assert copied
    assert [path for path in copied if not (ROOT / path).exists()] == []
    assert "constraints.txt" in copied
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {"pyproject.toml", re.search(r'^readme = "(.*)"', project, re.MULTILINE)[1]} <= set(copied)  # type: ignore[index]
    assert any(re.search(r"pip install .*-c constraints.txt '\.\[cluster\]'", line) for line in lines)
    base = re.match(r"FROM python:(\d+)\.(\d+)-", next(line for line in lines if line.startswith("FROM")))
    assert base
    assert (int(base[1]), int(base[2])) >= (3, 11)
    assert [line for line in lines if line.startswith("USER")] == ["USER ray"]


# Shell


@pytest.mark.parametrize("name", ["slurm.sbatch", "skypilot.yaml"])
def test_shellcheck_finds_nothing(name: str, sweep: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck (Debian's package of that name)")
    where = name.partition(".")[0]
    filled, _ = launched(capsys, where, sweep, "--set", "output=s3://b/my runs")
    for text in ((CLUSTER / name).read_text(encoding="utf-8"), filled):
        script = tmp_path / "script.sh"
        script.write_text("#!/bin/bash\n" + yaml.safe_load(text)["run"] if name.endswith(".yaml") else text)
        found = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


# How large, for how long


@pytest.fixture(scope="module")
def demo_plan() -> Plan:
    return plan_sweep(parse_spec("search: {trials: 12}", source="sweep", folder=Path()))


def test_size_follows_the_plan_where_the_user_leaves_it_open(demo_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def size(text: str, hours: float, **wishes: Any) -> Size:
        """Of a sweep that takes so many hours on any one GPU."""
        devices = tuple(replace(device, seconds=3600 * hours) for device in demo_plan.devices)
        plan = replace(demo_plan, devices=devices)
        monkeypatch.setattr("lora_search.launch.size.plan_sweep", lambda spec, gpus: plan)
        return size_cluster(parse_spec(text, source="sweep", folder=Path()), Wishes(**wishes))

    short = size("search: {trials: 12}", 1)
    assert (short.nodes, short.gpus_per_node, short.gpu) == (1, 1, "L4")
    assert short.limit >= 2 * short.seconds >= 7200
    assert short.limit % 60 == 0
    assert size("search: {trials: 12}", 1, time_limit="5h").limit == 18000
    assert size("search: {trials: 12}", 100).nodes == 1  # a second host would find no trial

    many = "search: {trials: 640, scheduler: {name: none}}"
    on_one, chosen = size(many, 100, nodes=1), size(many, 100)
    assert on_one.seconds == pytest.approx(360_000)
    assert chosen.seconds <= WORKING_DAY < size(many, 100, nodes=chosen.nodes - 1).seconds
    assert size(many, 100, nodes=1, gpus_per_node=8).seconds == pytest.approx(on_one.seconds / 8)
    assert size(many, 10_000).nodes == 640 // 16
    assert size("hosts: {count: 6, gpus_per_host: 2, cpus_per_host: 64}", 1).nodes == 6
    assert size("hosts: {gpus_per_host: 0}", 1).gpu is None


def test_gpu_that_cannot_hold_the_largest_trial_is_refused_and_skipped(
    demo_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [replace(device, largest=0) if device.name in ("T4", "L4") else device for device in demo_plan.devices]
    plan = replace(demo_plan, devices=tuple(devices))
    monkeypatch.setattr("lora_search.launch.size.plan_sweep", lambda spec, gpus: plan)
    spec = parse_spec("search: {trials: 12}", source="sweep", folder=Path())
    assert size_cluster(spec, Wishes()).gpu == "L40S"
    said = r"--gpu: found 'L4'; allowed, as the largest trial fits there: RTX 4090, L40S, .*, or on more with base.grad"
    with pytest.raises(InputError, match=said):
        size_cluster(spec, Wishes(gpu="L4"))


def test_plan_does_not_ask_this_machine_for_the_hosts_of_another(
    sweep: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--set", "hosts.count=6", "--set", "hosts.gpus_per_host=2", "--set", "hosts.cpus_per_host=64"]
    assert main(["launch", "--on", "slurm", sweep, *options]) == 0
    text = Path("Tiny.sweep.slurm.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --nodes=6 " in text
    assert "#SBATCH --gpus-per-node=2 " in text
    assert "by `lora-search plan`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "said"), [("runs", ", and the run directories' in runs."), ("s3://bucket/runs", ".\n")]
)
def test_slurm_says_which_folders_all_nodes_see(
    sweep: str, output: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--on", "slurm", sweep, *UNPLANNED, "--set", f"output={output}"]) == 0
    assert f"All nodes see the folder that you submit from{said}" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("8h", 28800), ("1.5h", 5400), ("2d", 172800)])
def test_time_limits_are_read(text: str, seconds: int) -> None:
    assert parse_limit(text) == seconds


@pytest.mark.parametrize(
    ("where", "options", "said"),
    [
        ("slurm", ["--nodes", "0"], "--nodes: found 0; allowed: a whole number from 1"),
        ("slurm", ["--gpus-per-node", "-1"], "--gpus-per-node: found -1; allowed"),
        ("slurm", ["--nodes", "1", "--time-limit", "soon"], "--time-limit: found 'soon'; allowed: minutes, hours"),
        ("slurm", ["--nodes", "1", "--time-limit", "1h", "--gpu", "A100"], "--gpu: found 'A100'; allowed: T4, RTX"),
        ("slurm", ["--set", "hosts.gpus_per_host=2", "--gpus-per-node", "3"], "multiples of hosts.gpus_per_host, 2"),
        ("slurm", ["--template", "mine.sbatch"], "--template: found 'mine.sbatch', which is no file; allowed: a file"),
        ("ray", ["--template", "skypilot.yaml"], "provider.type: found nothing; allowed: aws, gcp, local"),
        ("ray", UNPLANNED, "output: found 'runs', which each node would have to itself; allowed: a bucket"),
        ("skypilot", [*UNPLANNED, "--set", "output=s3://b/r", "--gpus-per-node", "0"], "--gpus-per-node: found 0"),
        (
            "ray",
            [*UNPLANNED, "--set", "output=s3://b/r", "--gpus-per-node", "3"],
            "--gpus-per-node: found 3; allowed on aws with L4: 1, 4, 8",
        ),
    ],
)
def test_wrong_options_exit_2_with_one_message(
    where: str, options: list[str], said: str, sweep: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--on", where, sweep, *options]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""
    assert list(Path().glob("Tiny*")) == []


# Submission


def test_submit_runs_the_printed_command(
    sweep: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text('#!/bin/sh\necho "$0 $@" > called\nexit ${SBATCH_EXIT:-0}\n', encoding="utf-8")
    (tools / "sbatch").chmod(0o755)
    arguments = ["launch", "--on", "slurm", sweep, *UNPLANNED, "--submit"]

    monkeypatch.setenv("PATH", "/usr/bin:/bin" if shutil.which("sbatch", path="/usr/bin:/bin") is None else "/bin.none")
    assert main(arguments) == 2
    assert "--submit: sbatch is not installed here; Tiny.sweep.slurm.sbatch is written" in capsys.readouterr().err
    assert not Path("called").exists()

    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    assert main(arguments) == 0
    command = capsys.readouterr().out.strip()
    assert Path("called").read_text(encoding="utf-8").split() == [str(tools / "sbatch"), *command.split()[1:]]

    monkeypatch.setenv("SBATCH_EXIT", "3")
    assert main(arguments) == 1
    assert "--submit: exit status 3 of: sbatch" in capsys.readouterr().err


def test_submit_refuses_a_file_that_is_not_complete(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["launch", "--on", "ray", sweep, *UNPLANNED, "--set", "output=s3://b/runs"]
    assert main(arguments) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Edit ")]
    assert [line.split(": ")[1] for line in said] == ["image", "ImageId", "SecurityGroupIds", "IamInstanceProfile"]
    assert main([*arguments, "--submit"]) == 2
    assert "EDIT first" in capsys.readouterr().err


def test_edited_launch_file_is_not_overwritten(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["launch", "--on", "slurm", sweep, *UNPLANNED]
    assert main(arguments) == main(arguments) == 0
    out = Path("Tiny.sweep.slurm.sbatch")
    edited = out.read_text(encoding="utf-8") + "# mine\n"
    out.write_text(edited, encoding="utf-8")
    assert main(arguments) == 2
    assert out.read_text(encoding="utf-8") == edited
    assert main([*arguments, "--template", str(out), "--out", "again.sbatch"]) == 0
    assert Path("again.sbatch").read_text(encoding="utf-8") == edited


def test_secrets_of_the_environment_reach_neither_file_nor_command(
    sweep: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = "planted-secret-4711"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, planted)
    for where in ("slurm", "kuberay", "ray", "skypilot"):
        text, command = launched(capsys, where, sweep, "--set", "output=s3://b/runs")
        assert planted not in text + command


def in_range(first: int, end: int) -> socket.socket:
    """Listens on this machine, on some port from the first on."""
    for port in range(first, end):
        with suppress(OSError):
            return socket.create_server(("127.0.0.1", port))
    raise OSError(f"no port is free from {first} to {end}")


WAITS = """
case "$*" in *launch.wait*)
    if [ -n "$PREEMPTED" ]; then kill -TERM "$PPID"; fi
    exit "$MISSING" ;;
esac"""
"""What stands for python3: Slurm preempts the job while it waits for its nodes, or some of them have not come."""


@dataclass(frozen=True)
class Job:
    """Of Slurm, whose tools here only note their arguments."""

    folder: Path
    """That it was submitted from."""
    port: int
    """Something listens there, as Ray's head would."""

    def start(
        self, *, script: Path = CLUSTER / "slurm.sbatch", preempted: bool = False, missing: bool = False, **more: str
    ) -> tuple[int, str, list[str], list[str]]:
        """Run its script; the status, what was said, with what lora-search was called, and in which job.

        Args:
            preempted: while it waits for its nodes.
            missing: whether some of its nodes do not come.
            more: variables of the environment.
        """
        tools, called = self.folder / "tools", self.folder / "called"
        tools.mkdir(exist_ok=True)
        does = {"scontrol": "echo localhost", "srun": "exec /bin/sleep 60", "python3": WAITS, "lora-search": NOTE_JOB}
        for name, then in does.items():
            (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "$CALLED"\n{then}\n', encoding="utf-8")
            (tools / name).chmod(0o755)
        called.unlink(missing_ok=True)
        environment = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "CALLED": str(called),
            "PREEMPTED": "1" * preempted,
            "MISSING": str(int(missing)),
            "RAY_HEAD_IP": "127.0.0.1",
            "SLURM_JOB_ID": str(self.port - 20_000),
            "SLURM_JOB_NAME": "sweep",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_CLUSTER_NAME": "here",
            "SLURM_SUBMIT_HOST": "login",
        } | more
        command = ["bash", str(script)]
        done = subprocess.run(
            command, env=environment, cwd=self.folder, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
        noted = called.read_text(encoding="utf-8")
        ran, jobs = (re.findall(rf"^{what} (.*)$", noted, re.MULTILINE) for what in ("lora-search", "job"))
        return done.returncode, done.stderr, ran, jobs


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with in_range(20_000, 32_000) as head:
        yield Job(tmp_path, head.getsockname()[1])


@pytest.mark.parametrize("arguments", [[], ["--resume"]], ids=["begins", "resumes"])
def test_slurm_job_that_was_preempted_does_the_same_again_by_the_same_name(
    arguments: list[str], job: Job, sweep: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By which lora-search finds the run that it has begun or resumed, where there is one: that is not for the script.

    Nor does it look at what Slurm has counted: it may have preempted the job before it began any.
    """
    launched(capsys, "slurm", sweep, *arguments)
    script = Path("launched.slurm")
    does = " ".join(["run", str(Path(sweep).resolve()), *arguments, f"--address 127.0.0.1:{job.port}"])
    name = f"slurm-here-login-{job.port - 20_000}"
    for restarts in ("", "0", "1", "3"):
        status, _, *ran = job.start(script=script, preempted=True, SLURM_RESTART_COUNT=restarts)
        assert (status, ran) == (-signal.SIGTERM, [[], []])
        assert job.start(script=script, SLURM_RESTART_COUNT=restarts) == (0, "", [does], [name])
    assert not list(job.folder.glob("*.begun"))


def test_slurm_job_has_a_name_of_its_own(job: Job) -> None:
    """Among those of other clusters that see the same folder, and of one whose numbers have begun anew."""
    places: list[dict[str, str]] = [{}, {"SLURM_CLUSTER_NAME": "there"}, {"SLURM_SUBMIT_HOST": "login-2"}]
    names = [job.start(**place)[3] for place in places]
    names.append(job.start(SLURM_JOB_ID=str(job.port - 20_000 + 12_000))[3])  # of an array, say
    assert len({name for (name,) in names}) == 4


def test_slurm_job_goes_on_without_a_node_that_never_comes(job: Job) -> None:
    status, said, ran, _ = job.start(missing=True)
    assert (status, len(ran)) == (0, 1)
    assert "WARNING: the sweep begins without the other nodes" in said


def test_slurm_gives_a_node_cores_by_its_gpus(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    def cores(*options: str) -> str:
        text, _ = launched(capsys, "slurm", sweep, *options)
        return re.findall(r"^#SBATCH --cpus-per-task=(\d+)\b", text, re.MULTILINE)[0]

    assert cores() == "8"
    assert cores("--gpus-per-node", "8") == "64"
    assert cores("--gpus-per-node", "8", "--set", "hosts.gpus_per_host=2") == "64"
    assert cores("--gpus-per-node", "8", "--set", "hosts.gpus_per_host=2", "--set", "hosts.cpus_per_host=6") == "24"
    mine = (CLUSTER / "slurm.sbatch").read_text(encoding="utf-8").replace("=8  # launch: cores", "=48")
    Path("mine.sbatch").write_text(mine, encoding="utf-8")
    assert cores("--template", "mine.sbatch", "--gpus-per-node", "8") == "48"
    mine = mine.replace("=48", "=48  # launch: cores")
    Path("mine.sbatch").write_text(mine, encoding="utf-8")
    without = ["--set", "hosts.gpus_per_host=0"]
    assert cores("--template", "mine.sbatch", *without) == "48"  # hosts take what cores there are


# Slurm, for real


@dataclass(frozen=True)
class Slurm:
    """A controller and two nodes on this machine."""

    environment: dict[str, str]
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """Their daemons."""

    def start_node(self, name: str) -> None:
        command, quiet = ["slurmd", "-D", "-N", name], subprocess.DEVNULL
        self.nodes[name] = subprocess.Popen(command, env=self.environment, stdout=quiet, stderr=quiet)

    def wait_for_nodes(self) -> None:
        end = time.monotonic() + 30
        while (found := self.run("sinfo", "--noheader", "--format=%T %D").split()) != ["idle", "2"]:
            assert time.monotonic() < end, found
            time.sleep(0.5)

    def run(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)

    def ended(self, number: str, seconds: float) -> dict[str, str]:
        end = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < end, f"still {job['JobState']} after {seconds} s"
            time.sleep(0.5)
        return job


CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
KillWait=5
SchedulerParameters=bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=1 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    needed = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol"]
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [program for program in needed if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (Debian's packages slurmctld, slurmd, slurm-client and munge)")
    if os.geteuid() != 0:
        pytest.skip("needs root, as slurmd does")
    folder = Path(tmp_path_factory.mktemp("slurm"))
    host = os.uname().nodename.partition(".")[0]
    for name in ("state", "spool-node1", "spool-node2", "home"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder), encoding="utf-8")
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n", encoding="utf-8")  # for Slurm, a GPU
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{path}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder / "home"),
        "SLURM_CONF": str(folder / "slurm.conf"),
    }
    munge = [f"--{kind}={folder}/munge.{kind.removesuffix('-file')}" for kind in ("socket", "key-file", "log-file")]
    daemons = [
        ["munged", "--force", "--foreground", *munge, f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/seed"],
        ["slurmctld", "-D"],
    ]
    cluster = Slurm(environment)
    started: list[subprocess.Popen[bytes]] = []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        for daemon in daemons:
            started.append(subprocess.Popen(daemon, env=environment, **quiet))  # type: ignore[call-overload]
            time.sleep(1)
        for node in ("node1", "node2"):
            cluster.start_node(node)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        processes = [*started, *cluster.nodes.values()]
        for daemon_process in reversed(processes):
            daemon_process.terminate()
        for daemon_process in processes:
            daemon_process.wait(30)


def processes_of(job: str) -> dict[int, tuple[str, dict[str, str]]]:
    """Command line and environment of a job's processes."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            environment = dict(variable.split("=", 1) for variable in variables if "=" in variable)
            command = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except (OSError, ValueError):
            continue
        if environment.get("SLURM_JOB_ID") == job:
            found[int(folder.name)] = (command, environment)
    return found


def require_gone(job: str) -> None:
    """No process of a job is left, but for moments: a raylet that nobody ends is there for another minute."""
    end = time.monotonic() + 20
    while left := processes_of(job):
        assert time.monotonic() < end, left
        time.sleep(0.5)


def submitted(slurm: Slurm, folder: Path, text: str) -> str:
    """Launch a sweep on both nodes through `lora-search launch --submit`; the job's number."""
    (folder / "sweep.yaml").write_text(text, encoding="utf-8")
    template = (CLUSTER / "slurm.sbatch").read_text(encoding="utf-8")
    (folder / "mine.sbatch").write_text(template.replace("=8  # launch: cores", "=1"), encoding="utf-8")
    options = ["--nodes", "2", "--gpus-per-node", "1", "--time-limit", "10m", "--template", "mine.sbatch"]
    command = [sys.executable, "-m", "lora_search", "launch", "--on", "slurm", "sweep.yaml", *options]
    printed = slurm.run(*command, "--set", "training.eval_every=2", "--submit", cwd=folder)
    number = re.search(r"Submitted batch job (\d+)", printed)
    assert number, printed
    return number[1]


def log(folder: Path, number: str) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"*-{number}*.log")))


SMALL = """
name: small
data: {limit: 400}
search: {space: {rank: {choice: [4, 8]}}, trials: 3}
training: {steps: STEPS}
tracking: {wandb: {mode: disabled}}
"""


def test_slurm_runs_a_sweep_over_two_nodes(slurm: Slurm, tmp_path: Path) -> None:
    number = submitted(slurm, tmp_path, SMALL.replace("STEPS", "4"))
    raylets: dict[int, tuple[str, dict[str, str]]] = {}
    arguments: set[str] = set()
    while slurm.job(number)["JobState"] in ("PENDING", "RUNNING"):
        seen = processes_of(number)
        arguments |= {command for command, _ in seen.values()}
        raylets |= {pid: found for pid, found in seen.items() if "raylet/raylet" in found[0].partition(" ")[0]}
        time.sleep(0.5)
    job = slurm.ended(number, 60)
    said = log(tmp_path, number)
    assert job["JobState"] == "COMPLETED", said
    assert job["TimeLimit"] == "00:10:00"
    assert "2 of 2 nodes of the cluster are here" in said
    assert (tmp_path / "runs/small/best/merged/model.safetensors").exists()

    nodes = {environment["SLURMD_NODENAME"] for _, environment in raylets.values()}
    tokens = {environment["RAY_AUTH_TOKEN"] for _, environment in raylets.values()}
    assert nodes == {"node1", "node2"}
    assert all(re.search(r"static_resource_list=\S*\bGPU,1\b", command) for command, _ in raylets.values())
    assert len(tokens) == 1
    token = tokens.pop()
    assert len(token) == 64
    assert not any(token in command for command in arguments)
    assert all(token.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    require_gone(number)


def test_slurm_job_that_is_told_to_stop_keeps_its_trials(slurm: Slurm, tmp_path: Path) -> None:
    number = submitted(slurm, tmp_path, SMALL.replace("STEPS", "5000"))
    trials = tmp_path / "runs/small/trials.jsonl"
    end = time.monotonic() + 90
    while not trials.exists() or "eval_loss" not in trials.read_text(encoding="utf-8"):
        assert time.monotonic() < end, log(tmp_path, number)
        time.sleep(0.5)
    slurm.run("scancel", "--batch", "--signal=TERM", number)  # as Slurm itself does before the time is up
    job = slurm.ended(number, 90)
    assert job["ExitCode"] == "130:0", log(tmp_path, number)
    assert "eval_loss" in trials.read_text(encoding="utf-8")
    require_gone(number)


def wait_for_reports(slurm: Slurm, number: str, folder: Path, hosts: int) -> None:
    """Until so many hosts have told how a trial of theirs fares."""
    record = folder / "runs/small/trials.jsonl"
    end = time.monotonic() + 120
    while not record.exists() or len({event["host"] for event in read_events(record) if "eval_loss" in event}) < hosts:
        assert time.monotonic() < end, log(folder, number)
        assert slurm.job(number)["JobState"] in ("PENDING", "RUNNING"), log(folder, number)
        time.sleep(0.2)


@pytest.mark.slow
def test_slurm_job_that_is_queued_again_goes_on_with_its_own_run(slurm: Slurm, tmp_path: Path) -> None:
    """Though it was submitted twice, so that the newest run is another job's."""
    number = submitted(slurm, tmp_path, SMALL.replace("STEPS", "60"))
    wait_for_reports(slurm, number, tmp_path, 1)
    own, newer = RunDirectory(tmp_path / "runs/small"), create_run(tmp_path / "runs", "small", exact=False)
    facts = json.loads(own.provenance.read_text(encoding="utf-8"))
    assert facts["job"].startswith("slurm-test-")
    assert facts["job"].endswith(f"-{number}")
    newer.spec.write_bytes(own.spec.read_bytes())
    newer.provenance.write_text(others := json.dumps(facts | {"job": f"{facts['job']}1"}), encoding="utf-8")

    slurm.run("scontrol", "requeue", number)
    while slurm.job(number)["Restarts"] == "0" or not processes_of(number):
        time.sleep(0.5)
    job = slurm.ended(number, 120)
    said = log(tmp_path, number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), said
    now = json.loads(own.provenance.read_text(encoding="utf-8"))
    assert (now["id"], now["job"], len(now["resumed"])) == (facts["id"], facts["job"], 1)
    assert f"going on with runs/small, the run of this job ({facts['job']})\n" in said
    assert (own.best / "merged/model.safetensors").exists()
    assert (newer.provenance.read_text(encoding="utf-8"), newer.trials.exists()) == (others, False)
    assert {path.name for path in own.path.parent.iterdir()} == {"small", "small-2"}
    require_gone(number)


@pytest.fixture
def node_that_fails(slurm: Slurm) -> Iterator[str]:
    """The second, where the script does not run; afterwards it is there again."""
    yield "node2"
    slurm.nodes["node2"].kill()
    slurm.nodes["node2"].wait()
    slurm.start_node("node2")
    slurm.wait_for_nodes()


@pytest.mark.slow
def test_slurm_node_that_fails_does_not_end_the_job(slurm: Slurm, node_that_fails: str, tmp_path: Path) -> None:
    number = submitted(slurm, tmp_path, SMALL.replace("[4, 8]", "[4, 8, 12]").replace("STEPS", "60"))
    wait_for_reports(slurm, number, tmp_path, 2)
    there = [pid for pid, (_, seen) in processes_of(number).items() if seen.get("SLURMD_NODENAME") == node_that_fails]
    keepers = {parent for pid in there for parent in psutil.Process(pid).parents() if "slurmstepd" in parent.name()}
    assert len(keepers) == 1
    for process in (slurm.nodes[node_that_fails], *keepers):
        process.kill()
    for pid in there:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    slurm.nodes[node_that_fails].wait()
    slurm.run("scontrol", "update", f"NodeName={node_that_fails}", "State=DOWN", "Reason=it does not answer")

    job = slurm.ended(number, 150)
    said = log(tmp_path, number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), said
    ends = [event for event in read_events(tmp_path / "runs/small/trials.jsonl") if event["event"] == "end"]
    assert sorted(event["trial"] for event in ends) == [0, 1, 2]
    assert (tmp_path / "runs/small/best/merged/model.safetensors").exists()
