"""A sweep's launch file and the command that submits it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_search.errors import InputError
from lora_search.launch.kuberay import fill_kuberay
from lora_search.launch.machines import SKYPILOT
from lora_search.launch.ray_up import fill_ray, machines_of_ones_own
from lora_search.launch.request import TOKEN, Filled, Request, check_output, cores_of, same_paths
from lora_search.launch.size import Size, Wishes, size_cluster
from lora_search.launch.template import left_to_edit, load_template
from lora_search.spec import SweepSpec
from lora_search.storage import is_uri


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
        wishes = replace(wishes, nodes=machines_of_ones_own(source))
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


def _slurm(request: Request) -> Filled:
    size = request.size
    minutes = size.limit // 60
    values: dict[str, str | None] = {
        "name": request.spec.name,
        "nodes": str(size.nodes),
        "gpus": str(size.gpus_per_node),
        "cores": cores_of(request),
        "time": f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00",
        "sweep": shlex.quote(str(request.sweep)),
        "arguments": f"({shlex.join(request.options)})",
    }
    note = "All nodes see the folder that you submit from" + (
        "." if is_uri(request.spec.output) else f", and the run directories' in {request.spec.output}."
    )
    return Filled(values, shlex.join(["sbatch", str(request.out)]), ("sbatch",), "node of the partition", (note,))


def _skypilot(request: Request) -> Filled:
    size = request.size
    if size.gpu is None:
        raise InputError("--gpus-per-node: found 0; allowed on skypilot: 1 or more")
    check_output(request)
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
    return Filled(values, command, ("ray", "sky"), machine, same_paths(request.spec))


@dataclass(frozen=True)
class Platform:
    """A place that sweeps are launched on."""

    template: str
    fill: Callable[[Request], Filled]


PLATFORMS = {
    "slurm": Platform("slurm.sbatch", _slurm),
    "kuberay": Platform("kuberay-job.yaml", fill_kuberay),
    "ray": Platform("ray-aws.yaml", fill_ray),
    "skypilot": Platform("skypilot.yaml", _skypilot),
}
