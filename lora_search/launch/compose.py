"""A sweep's launch file and the command that submits it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import lora_search
from lora_search.errors import InputError
from lora_search.launch.machines import DISK, DISKS, MACHINES, SKYPILOT, find_machine
from lora_search.launch.size import START, Size, Wishes, size_cluster
from lora_search.launch.template import Template, left_to_edit, load_template
from lora_search.spec import SweepSpec, dump_spec
from lora_search.storage import is_uri

VOLUME = Path("/shared")
"""Where the pods of kuberay-job.yaml mount the volume that all of them see."""

ENTRYPOINT = ("lora-search", "run", "/etc/lora-search/sweep.yaml", "--address", "auto")
"""What the head pod runs."""

REPLACED_S = 900
"""Within so many seconds a platform that replaces lost nodes is taken to have started a new one."""

CORES_PER_GPU = 8
"""What a node's job or pod asks for where the sweep file leaves it open: a GPU's host, its seats, and Ray."""

TOKEN = "(umask 077; ray get-auth-token --generate > /dev/null)"
"""Makes sure that there is a token at ~/.ray/auth_token, and shows it to nobody."""


@dataclass(frozen=True)
class Request:
    """What is to be launched."""

    spec: SweepSpec
    sweep: Path
    overrides: tuple[str, ...]
    size: Size
    image: str | None
    """None leaves the template's."""
    resumes: bool
    template: Template
    out: Path

    @property
    def label(self) -> str:
        """The sweep's name as every platform takes it: lower case, a letter first, at most 40 characters."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.spec.name.lower())[:40].strip("-")
        return plain if plain[:1].isalpha() else f"sweep-{plain}"[:40].rstrip("-")

    @property
    def options(self) -> list[str]:
        """Of the run, where it finds local files as this machine does."""
        sets = [part for override in self.overrides for part in ("--set", override)]
        return sets + ["--resume"] * self.resumes

    @property
    def options_elsewhere(self) -> list[str]:
        """Of the run, where the sweep file is in another folder: local files by their whole paths."""
        paths = tuple(f"{key}={json.dumps(path)}" for key, path in _local_files(self.spec).items())
        return replace(self, overrides=(*self.overrides, *paths)).options


@dataclass(frozen=True)
class Launch:
    """A launch file, not yet written."""

    out: Path
    text: str
    command: str
    """For a shell."""
    tools: tuple[str, ...]
    """Programs that the command needs."""
    size: Size
    machine: str
    """What a node is, as its price list or its administrator calls it."""
    edits: tuple[tuple[int, str], ...]
    """Number and text of the lines that only the user can complete."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Filled:
    values: dict[str, str | None]
    """What stands in the template stays where one is None."""
    command: str
    tools: tuple[str, ...]
    machine: str
    notes: tuple[str, ...] = ()


def compose(
    where: str,
    spec: SweepSpec,
    sweep: Path,
    overrides: Sequence[str] = (),
    wishes: Wishes = Wishes(),  # noqa: B008 - frozen
    *,
    template: str | None = None,
    image: str | None = None,
    out: Path | None = None,
    resumes: bool = False,
) -> Launch:
    """Plan a sweep and fill in its launch file.

    Args:
        where: one of `PLATFORMS`.
        sweep: the sweep's file.
        overrides: `key.path=value`, already laid over `spec`.
        template: a file, or the name of one in cluster/; default: the platform's own.
        image: reference of a container image with lora-search; default: the template's.
        out: the launch file to be.
        resumes: whether the run goes on with the newest of its name.

    Raises:
        InputError: something of it cannot be; the message is complete.
    """
    platform = PLATFORMS[where]
    source = load_template(template, platform.template)
    if wishes.nodes is None and where == "ray":
        wishes = replace(wishes, nodes=_machines_of_ones_own(source))
    size = size_cluster(spec, wishes)
    request = Request(
        spec=spec,
        sweep=sweep.resolve(),
        overrides=tuple(overrides),
        size=size,
        image=image,
        resumes=resumes,
        template=source,
        out=out or Path(f"{spec.name}{'-resume' * resumes}.{where}{source.path.suffix}"),
    )
    filled = platform.fill(request)
    text = source.fill(filled.values)
    return Launch(
        out=request.out,
        text=text,
        command=filled.command,
        tools=filled.tools,
        size=size,
        machine=filled.machine,
        edits=tuple(left_to_edit(text)),
        notes=filled.notes,
    )


def _slurm(request: Request) -> _Filled:
    size = request.size
    minutes = size.limit // 60
    values: dict[str, str | None] = {
        "name": request.spec.name,
        "nodes": str(size.nodes),
        "gpus": str(size.gpus_per_node),
        "cores": _cores(request),
        "time": f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00",
        "sweep": shlex.quote(str(request.sweep)),
        "arguments": f"({shlex.join(request.options)})",
    }
    note = "All nodes see the folder that you submit from" + (
        "." if is_uri(request.spec.output) else f", and the run directories' in {request.spec.output}."
    )
    return _Filled(values, shlex.join(["sbatch", str(request.out)]), ("sbatch",), "node of the partition", (note,))


def _cores(request: Request) -> str | None:
    """Of a node, by its hosts; None where it has no GPU, and hosts take what cores there are."""
    hosts, gpus = request.spec.hosts, request.size.gpus_per_node
    if gpus == 0:
        return None
    each = CORES_PER_GPU * hosts.gpus_per_host if hosts.cpus_per_host == "auto" else hosts.cpus_per_host
    return str(gpus // hosts.gpus_per_host * each)


def _kuberay(request: Request) -> _Filled:
    takes_it = "# launch: sweep" in request.template.text
    request, patience = _patient(request) if takes_it else (request, [])
    objects = _objects(request.template)
    spec, copies = _on_volume(request.spec, tuple(_mounts(objects)))
    size = request.size
    values: dict[str, str | None] = {
        "name": request.label,
        "configmap": f"{{name: {request.label}}}",
        "sweep": dump_spec(spec),
        "entrypoint": shlex.join([*_until(size.limit), *ENTRYPOINT, *["--resume"] * request.resumes]),
        "seconds": str(size.limit + START),
        "image": json.dumps(request.image) if request.image else None,
        "nodes": str(size.nodes),
        "gpus": str(size.gpus_per_node),
        "cores": _cores(request),
    }
    notes = [
        f"The claim lora-search is mounted at {VOLUME} in every pod; the run directory is {spec.output}/{spec.name}."
    ]
    notes += [f"Copy {here} to the volume first, as {there}." for here, there in copies]
    notes += patience
    out = shlex.quote(str(request.out))
    if not any(isinstance(each, dict) and each.get("kind") == "RayJob" for each in objects):
        command = f"kubectl apply -f {out}"  # a cluster stays, and is changed
    else:
        # A job that has ended begins again only when it is made anew. Where its sweep alone is left of an earlier one,
        # kubectl create would refuse that, and go on to make a job which runs it: so it is asked first.
        asked = f"kubectl create --dry-run=server -f {out} > /dev/null"
        first = f"kubectl delete --ignore-not-found -f {out}" if request.resumes else asked
        command = f"{first} && kubectl create -f {out}"
    return _Filled(values, command, ("kubectl",), "node that holds a worker pod", tuple(notes))


def _objects(template: Template) -> list[Any]:
    """What a template for Kubernetes makes.

    Raises:
        InputError: it is not YAML.
    """
    try:
        return list(yaml.safe_load_all(template.text))
    except yaml.YAMLError as error:
        raise InputError(f"{template.path}: not YAML: {error}") from None


def _mounts(value: Any) -> Iterator[Path]:
    """Where pods see volumes, a template's own and those that the user has put in."""
    if isinstance(value, dict):
        if isinstance(value.get("mountPath"), str):
            yield Path(value["mountPath"])
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        yield from _mounts(part)


def _on_volume(spec: SweepSpec, mounts: Sequence[Path]) -> tuple[SweepSpec, list[tuple[Path, Path]]]:
    """The sweep as the pods see it: the volume stands for the working directory. And what has to be copied there.

    Raises:
        InputError: a path is neither below the working directory nor on a volume of the pods.
    """
    copies: list[tuple[Path, Path]] = []

    def moved(key: str, path: Path) -> Path:
        here = Path(os.path.normpath(Path.cwd() / path))
        if any(here.is_relative_to(mount) for mount in mounts):
            return here
        if not here.is_relative_to(Path.cwd()):
            volumes = ", ".join(dict.fromkeys(map(str, mounts)))
            raise InputError(
                f"{key}: found {str(path)!r}, which no pod sees; allowed: a path below {Path.cwd()}, for which "
                f"{VOLUME} stands in the pods, or one below a volume of the template: {volumes}"
            )
        there = VOLUME / here.relative_to(Path.cwd())
        if key != "output":
            copies.append((here, there))
        return there

    files = {key: str(moved(key, Path(path))) for key, path in _local_files(spec).items()}
    base = spec.base.model_copy(update={"model": files.pop("base.model", spec.base.model)})
    data = spec.data.model_copy(update={key.removeprefix("data."): path for key, path in files.items()})
    output = spec.output if is_uri(spec.output) else str(moved("output", Path(spec.output)))
    return spec.model_copy(update={"base": base, "data": data, "output": output}), copies


def _provider(template: Template) -> dict[str, Any]:
    """Whose machines a file for `ray up` takes."""
    try:
        provider = yaml.safe_load(template.text)["provider"]
        if provider["type"] in (*MACHINES, "local"):
            return dict(provider)
        found = repr(provider["type"])
    except (yaml.YAMLError, KeyError, TypeError):
        found = "nothing"
    raise InputError(f"{template.path}: provider.type: found {found}; allowed: {', '.join(MACHINES)}, local")


def _machines_of_ones_own(template: Template) -> int | None:
    """How many machines a file for `ray up` names; none where it rents them."""
    provider = _provider(template)
    return 1 + len(provider.get("worker_ips", [])) if provider["type"] == "local" else None


def _ray(request: Request) -> _Filled:
    rented = _provider(request.template)
    provider = rented["type"]
    size = request.size
    _check_output(request)
    values: dict[str, str | None] = {
        "name": request.label,
        "checkout": json.dumps(_checkout()),
    }
    machine, nodes = "machine of yours", size.nodes
    patience: list[str] = []
    if provider in MACHINES:
        request, patience = _patient(request)
        if size.gpu is None:
            raise InputError(f"--gpus-per-node: found 0; allowed on {provider}: 1 or more")
        machine, cores = find_machine(provider, size.gpu, size.gpus_per_node)
        values |= {
            "nodes": str(size.nodes),
            "image": json.dumps(request.image) if request.image else None,
            "machine": machine,
            "disk": f"zones/{rented.get('availability_zone')}/diskTypes/{DISKS.get(size.gpu, DISK)}",
            "resources": f"{{CPU: {cores}, GPU: {size.gpus_per_node}}}",
        }
        nodes += 1  # the head
    wait = ["python3", "-m", "lora_search.launch.wait", "--nodes", str(nodes)]
    run = [*_until(size.limit), "lora-search", "run", "sweep.yaml", "--address", "auto", *request.options_elsewhere]
    # Rented machines may be short; those that come later get hosts. One of the user's own that is missing is a mistake.
    then = ";" if provider in MACHINES else " &&"
    work = f"export RAY_AUTH_MODE=token; {shlex.join(wait)}{then} {shlex.join(run)}"
    # `ray exec --stop` ends with `sudo shutdown`: right for rented workers, never for a machine of the user's.
    stop = ["--stop"] if provider in MACHINES else []
    out = str(request.out)
    steps = [
        ["ray", "up", "-y", out],
        # A file that is mounted would stay what it was in a container that runs already.
        ["ray", "rsync-up", out, str(request.sweep), "~/sweep.yaml"],
        ["ray", "exec", "--tmux", *stop, out, work],
    ]
    command = " && ".join([TOKEN, *map(shlex.join, steps)])
    return _Filled(values, command, ("ray",), machine, (*_same_paths(request.spec), *patience))


def _skypilot(request: Request) -> _Filled:
    size = request.size
    if size.gpu is None:
        raise InputError("--gpus-per-node: found 0; allowed on skypilot: 1 or more")
    _check_output(request)
    values: dict[str, str | None] = {
        "name": request.label,
        "nodes": str(size.nodes),
        "accelerators": json.dumps(f"{SKYPILOT[size.gpu]}:{size.gpus_per_node}"),
        "image": json.dumps(f"docker:{request.image}") if request.image else None,
        "sweep": json.dumps(str(request.sweep)),
        "limit": json.dumps(str(size.limit)),
        "arguments": json.dumps(shlex.join(request.options_elsewhere)),
    }
    launch = shlex.join(["sky", "launch", "-y", "-d", "-c", request.label])
    secrets = " ".join(f"${{{name}:+--secret {name}}}" for name in ("HF_TOKEN", "WANDB_API_KEY"))
    command = f"{TOKEN} && {launch} {secrets} {shlex.quote(str(request.out))}"
    machine = f"machine with {SKYPILOT[size.gpu]}:{size.gpus_per_node}"
    return _Filled(values, command, ("ray", "sky"), machine, _same_paths(request.spec))


def _patient(request: Request) -> tuple[Request, list[str]]:
    """The request where lost nodes are replaced: the sweep waits for new ones, unless the user says how long.

    And what there is to say of it.
    """
    hosts = request.spec.hosts
    if "wait_s" in hosts.model_fields_set or request.size.gpu is None:
        return request, []
    spec = request.spec.model_copy(update={"hosts": hosts.model_copy(update={"wait_s": float(REPLACED_S)})})
    note = f"Should all workers be lost at once, new ones are waited for, {REPLACED_S} s (hosts.wait_s)."
    return replace(request, spec=spec, overrides=(*request.overrides, f"hosts.wait_s={REPLACED_S}")), [note]


def _until(seconds: int) -> list[str]:
    """Before a command: it is told to stop after so long, and says by its exit status that it did."""
    return ["timeout", "--preserve-status", str(seconds)]


def _check_output(request: Request) -> None:
    output = request.spec.output
    if not is_uri(output) and not Path(output).is_absolute():
        raise InputError(
            f"output: found {output!r}, which each node would have to itself; allowed: a bucket or the path of a "
            "folder that all nodes see, as in --set output=s3://BUCKET/runs"
        )


def _local_files(spec: SweepSpec) -> dict[str, str]:
    """The files and folders of this machine that a sweep reads, by their keys in the sweep file."""
    values = {"base.model": spec.base.model, "data.path": spec.data.path}
    values |= {f"data.{key}": getattr(spec.data, key) for key in ("validation", "test")}  # a path, or a share
    return {key: value for key, value in values.items() if isinstance(value, str) and Path(value).is_absolute()}


def _same_paths(spec: SweepSpec) -> tuple[str, ...]:
    """What local files ask of the nodes."""
    files = _local_files(spec).items()
    return tuple(f"{key} {path} has to lie at the same path on every node." for key, path in files)


def _checkout() -> str:
    """The root of the checkout that lora-search runs from; the working directory where it is an installed package."""
    root = Path(lora_search.__file__).resolve().parent.parent
    return str(root) if (root / "pyproject.toml").is_file() else "."


@dataclass(frozen=True)
class Platform:
    """A place that sweeps are launched on."""

    template: str
    fill: Callable[[Request], _Filled]


PLATFORMS = {
    "slurm": Platform("slurm.sbatch", _slurm),
    "kuberay": Platform("kuberay-job.yaml", _kuberay),
    "ray": Platform("ray-aws.yaml", _ray),
    "skypilot": Platform("skypilot.yaml", _skypilot),
}
