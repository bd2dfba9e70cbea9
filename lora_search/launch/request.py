"""What is to be launched, and what platforms ask of it alike."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from lora_search.errors import InputError
from lora_search.launch.size import Size
from lora_search.launch.template import Template
from lora_search.spec import SweepSpec
from lora_search.storage import is_uri

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
        paths = tuple(f"{key}={json.dumps(path)}" for key, path in local_files(self.spec).items())
        return replace(self, overrides=(*self.overrides, *paths)).options


@dataclass(frozen=True)
class Filled:
    """What a platform makes of a request."""

    values: dict[str, str | None]
    """What stands in the template stays where one is None."""
    command: str
    tools: tuple[str, ...]
    machine: str
    notes: tuple[str, ...] = ()


def cores_of(request: Request) -> str | None:
    """Of a node, by its hosts; None where it has no GPU, and hosts take what cores there are."""
    hosts, gpus = request.spec.hosts, request.size.gpus_per_node
    if gpus == 0:
        return None
    each = CORES_PER_GPU * hosts.gpus_per_host if hosts.cpus_per_host == "auto" else hosts.cpus_per_host
    return str(gpus // hosts.gpus_per_host * each)


def patient(request: Request) -> tuple[Request, list[str]]:
    """The request where lost nodes are replaced: the sweep waits for new ones, unless the user says how long.

    And what there is to say of it.
    """
    hosts = request.spec.hosts
    if "wait_s" in hosts.model_fields_set or request.size.gpu is None:
        return request, []
    spec = request.spec.model_copy(update={"hosts": hosts.model_copy(update={"wait_s": float(REPLACED_S)})})
    note = f"Should all workers be lost at once, new ones are waited for, {REPLACED_S} s (hosts.wait_s)."
    return replace(request, spec=spec, overrides=(*request.overrides, f"hosts.wait_s={REPLACED_S}")), [note]


def until(seconds: int) -> list[str]:
    """Before a command: it is told to stop after so long, and says by its exit status that it did."""
    return ["timeout", "--preserve-status", str(seconds)]


def check_output(request: Request) -> None:
    output = request.spec.output
    if not is_uri(output) and not Path(output).is_absolute():
        raise InputError(
            f"output: found {output!r}, which each node would have to itself; allowed: a bucket or the path of a "
            "folder that all nodes see, as in --set output=s3://BUCKET/runs"
        )


def local_files(spec: SweepSpec) -> dict[str, str]:
    """The files and folders of this machine that a sweep reads, by their keys in the sweep file."""
    values = {"base.model": spec.base.model, "data.path": spec.data.path}
    values |= {f"data.{key}": getattr(spec.data, key) for key in ("validation", "test")}  # a path, or a share
    return {key: value for key, value in values.items() if isinstance(value, str) and Path(value).is_absolute()}


def same_paths(spec: SweepSpec) -> tuple[str, ...]:
    """What local files ask of the nodes."""
    files = local_files(spec).items()
    return tuple(f"{key} {path} has to lie at the same path on every node." for key, path in files)
