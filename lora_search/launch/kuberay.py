"""A sweep on Kubernetes: what its pods see, and how a job of theirs is made."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_search.errors import InputError
from lora_search.launch.request import Filled, Request, cores_of, local_files, patient, until
from lora_search.launch.size import START
from lora_search.launch.template import Template
from lora_search.spec import SweepSpec, dump_spec
from lora_search.storage import is_uri

VOLUME = Path("/shared")
"""Where the pods of kuberay-job.yaml mount the volume that all of them see."""

ENTRYPOINT = ("lora-search", "run", "/etc/lora-search/sweep.yaml", "--address", "auto")
"""What the head pod runs."""


def fill_kuberay(request: Request) -> Filled:
    takes_it = "# launch: sweep" in request.template.text
    request, patience = patient(request) if takes_it else (request, [])
    objects = _objects(request.template)
    spec, copies = _on_volume(request.spec, tuple(_mounts(objects)))
    size = request.size
    values: dict[str, str | None] = {
        "name": request.label,
        "configmap": f"{{name: {request.label}}}",
        "sweep": dump_spec(spec),
        "entrypoint": shlex.join([*until(size.limit), *ENTRYPOINT, *["--resume"] * request.resumes]),
        "seconds": str(size.limit + START),
        "image": json.dumps(request.image) if request.image else None,
        "nodes": str(size.nodes),
        "gpus": str(size.gpus_per_node),
        "cores": cores_of(request),
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
    return Filled(values, command, ("kubectl",), "node that holds a worker pod", tuple(notes))


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

    files = {key: str(moved(key, Path(path))) for key, path in local_files(spec).items()}
    base = spec.base.model_copy(update={"model": files.pop("base.model", spec.base.model)})
    data = spec.data.model_copy(update={key.removeprefix("data."): path for key, path in files.items()})
    output = spec.output if is_uri(spec.output) else str(moved("output", Path(spec.output)))
    return spec.model_copy(update={"base": base, "data": data, "output": output}), copies
