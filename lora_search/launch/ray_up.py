"""A sweep on machines of `ray up`: rented ones, or the user's own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

import lora_search
from lora_search.errors import InputError
from lora_search.launch.machines import DISK, DISKS, MACHINES, find_machine
from lora_search.launch.request import TOKEN, Filled, Request, check_output, patient, same_paths, until
from lora_search.launch.template import Template


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


def machines_of_ones_own(template: Template) -> int | None:
    """How many machines a file for `ray up` names; none where it rents them."""
    provider = _provider(template)
    return 1 + len(provider.get("worker_ips", [])) if provider["type"] == "local" else None


def fill_ray(request: Request) -> Filled:
    rented = _provider(request.template)
    provider = rented["type"]
    size = request.size
    check_output(request)
    values: dict[str, str | None] = {
        "name": request.label,
        "checkout": json.dumps(_checkout()),
    }
    machine, nodes = "machine of yours", size.nodes
    patience: list[str] = []
    if provider in MACHINES:
        request, patience = patient(request)
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
    run = [*until(size.limit), "lora-search", "run", "sweep.yaml", "--address", "auto", *request.options_elsewhere]
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
    return Filled(values, command, ("ray",), machine, (*same_paths(request.spec), *patience))


def _checkout() -> str:
    """The root of the checkout that lora-search runs from; the working directory where it is an installed package."""
    root = Path(lora_search.__file__).resolve().parent.parent
    return str(root) if (root / "pyproject.toml").is_file() else "."
