"""What this machine and a cluster can do, and what is missing."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lora_search.errors import SweepError
from lora_search.machine import gpus_are_logical, memory_bytes, unseen_gpus
from lora_search.placement import Node
from lora_search.storage import Folder, is_uri
from lora_search.versions import differences, versions

State = Literal["ok", "note", "wrong"]

MOST_CLOCK_SKEW_S = 5.0
LEAST_DISK_BYTES = 5 << 30
NODE_ANSWERS_S = 60.0
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    state: State
    """note: a sweep runs all the same, but the user may want to know."""
    found: str


def examine(address: str | None, output: str) -> Iterator[Check]:
    """Look at this machine, and at the Ray cluster at an address, if one is given."""
    yield from _machine(output)
    if address is not None:
        yield from _cluster(address, output if is_uri(output) else str(Path(output).expanduser().resolve()))


def _machine(output: str) -> Iterator[Check]:
    found = versions()
    missing = [name for name, version in found.items() if version is None]
    yield Check("packages", "wrong" if missing else "ok", _packages(found))
    if missing:
        return
    yield from _devices()
    yield _attempt("NF4", _nf4)
    yield Check("cores and memory", "ok", f"{os.cpu_count()} cores, {memory_bytes() / 2**30:.1f} GiB")
    yield _attempt(f"output {output}", lambda: _writes(output))
    if not is_uri(output):
        free = shutil.disk_usage(_existing(Path(output))).free
        yield Check("free disk", "ok" if free >= LEAST_DISK_BYTES else "note", f"{free / 2**30:.1f} GiB")
    from lora_search.tracking.wandb import wandb_mode

    mode = wandb_mode("auto")
    hint = "" if mode != "offline" else ": no key; set WANDB_API_KEY or run `wandb login` to record online"
    yield Check("W&B", "ok" if mode == "online" else "note", mode + hint)
    yield _hub()


def _devices() -> Iterator[Check]:
    import torch

    from lora_search.model.precision import compute_dtype

    if not torch.cuda.is_available():
        dtype = str(compute_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
        yield Check("GPU", "note", f"none; trials would train on the CPU, in {dtype}")
        return
    from lora_search.engine.fused import fuses

    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        working = compute_dtype("auto", device)
        dtype = str(working).removeprefix("torch.")
        found = f"{properties.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {dtype}"
        yield Check(f"GPU {index}", "ok" if free > 0.8 * total else "note", found)
        what = f"kernels on GPU {index}"
        kernels = _attempt(what, partial(_word, fuses, device, working))
        if not kernels.found:
            yield Check(what, "note", "none: packs of many trials are slower (gcc, Python's headers, Triton's GPUs)")
        elif kernels.state != "ok":
            yield kernels


def _word(there: Callable[..., bool], *of: object) -> str:
    return "there" if there(*of) else ""


def _nf4() -> str:
    """Quantise a matrix and multiply with it, as training does."""
    import torch

    from lora_search.model.precision import round_trip_nf4

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
    error = float((round_trip_nf4(weight) - weight).abs().max())
    if error > 0.2:  # half the widest step of NF4 is 0.15 of the largest weight
        raise SweepError(f"bitsandbytes quantises wrongly on {device}: off by {error:.2f}")
    return f"bitsandbytes quantises on {device}"


def _hub() -> Check:
    import httpx
    from huggingface_hub import constants, get_token

    token = "a token is set" if get_token() else "no token: gated models cannot be loaded"
    if constants.HF_HUB_OFFLINE:
        return Check("model hub", "note", f"HF_HUB_OFFLINE is set: what is in the cache is used; {token}")
    try:
        httpx.head(HUB, timeout=5)
    except httpx.HTTPError as error:
        return Check("model hub", "note", f"not reachable ({type(error).__name__}): use local folders; {token}")
    return Check("model hub", "ok", token)


def _cluster(address: str, output: str) -> Iterator[Check]:
    import ray

    from lora_search.sweep.cluster import cluster, nodes, on_node

    with cluster(address):
        there = nodes()
        gpus, cores = sum(node.gpus for node in there), sum(node.cpus for node in there)
        yield Check("cluster", "ok", f"{len(there)} nodes, {gpus} GPUs, {cores} cores")
        with _marked(output) as mark:
            look = ray.remote(num_cpus=0, max_retries=0)(look_at_node)
            began = time.time()
            asked = {node.id: look.options(scheduling_strategy=on_node(node.id)).remote(output, mark) for node in there}
            for node in there:
                try:
                    yield _node(node, ray.get(asked[node.id], timeout=NODE_ANSWERS_S), began)
                except ray.exceptions.RayError as error:
                    yield Check(f"node {node.id[:8]}", "wrong", str(error).strip().splitlines()[-1])
        yield from _hosts()


@contextmanager
def _marked(output: str) -> Iterator[str | None]:
    """The name of a file in the output, while it is there; None where it cannot be written, as was said before."""
    mark, folder = f".doctor-{uuid.uuid4().hex[:8]}", Folder(output, patience_s=0)
    try:
        folder.write(mark, b"")
    except (OSError, ValueError):
        yield None
        return
    try:
        yield mark
    finally:
        with suppress(OSError):
            folder.remove(mark)


def look_at_node(output: str, mark: str | None) -> dict[str, Any]:
    """What one node says of itself; runs there.

    Args:
        mark: a file that the driver has written to the output, if it could.
    """
    import torch

    try:
        folder = Folder(output, patience_s=0)
        sees = mark is None or mark in folder.names()
        storage = None if sees else "it does not see there what this machine has written"
        folder.check()
    except (OSError, ValueError) as error:
        storage = str(error)
    return {
        "host": os.uname().nodename,
        "versions": versions(),
        "time": time.time(),
        "output": output,
        "storage": storage,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _node(node: Node, said: dict[str, Any], began: float) -> Check:
    """
    Args:
        began: when it was asked, by this machine's clock; it has answered since, but may have taken its time.
    """
    skew = said["time"] - min(max(said["time"], began), time.time())
    wrong = differences(versions(), said["versions"])
    if said["storage"] is not None:
        wrong.append(f"output {said['output']}: {said['storage']}")
    if len(said["gpus"]) < node.gpus and not gpus_are_logical():
        wrong.append(unseen_gpus(node.gpus, len(said["gpus"])))
    name, found = f"node {node.id[:8]}", f"{said['host']}, {', '.join(said['gpus']) or 'no GPU'}"
    if wrong:
        return Check(name, "wrong", f"{found}: {'; '.join(wrong)}")
    if abs(skew) > MOST_CLOCK_SKEW_S:
        return Check(name, "note", f"{found}: its clock is {skew:+.0f} s off (no harm to a sweep)")
    return Check(name, "ok", f"{found}, same versions")


def _hosts() -> Iterator[Check]:
    """The hosts of the sweeps that run on the cluster now."""
    import ray

    from lora_search.sweep.running import HOST_NAMES

    asked: dict[str, Any] = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith(HOST_NAMES):
            with suppress(ValueError):  # it has ended since its name was heard
                asked[actor["name"]] = ray.get_actor(actor["name"], namespace=actor["namespace"]).describe.remote()
    end = time.monotonic() + NODE_ANSWERS_S
    for name, answer in asked.items():
        try:
            yield Check(name, "ok", ray.get(answer, timeout=max(0.0, end - time.monotonic())))
        except ray.exceptions.GetTimeoutError:
            yield Check(name, "note", "does not answer: it waits for cores or GPUs that something else holds, or hangs")
        except ray.exceptions.ActorDiedError:  # it has ended since it was asked
            continue
        except ray.exceptions.RayError as error:
            yield Check(name, "wrong", str(error).strip().splitlines()[0])


def _writes(output: str) -> str:
    Folder(output, patience_s=0).check()
    return "can be written to"


def _attempt(what: str, work: Callable[[], str]) -> Check:
    try:
        return Check(what, "ok", work())
    except Exception as error:  # whatever is wrong with a library or a disk is what is asked for
        return Check(what, "wrong", f"{type(error).__name__}: {error}")


def _existing(path: Path) -> Path:
    path = path.expanduser().resolve()
    return path if path.exists() else _existing(path.parent)


def _packages(found: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
