"""What clouds call their GPUs, and the machines that hold them."""

from __future__ import annotations

import re

from lora_search.errors import InputError
from lora_search.plan.devices import GPUS

NAMES = tuple(gpu.name for gpu in GPUS)

SKYPILOT = {
    "T4": "T4",
    "RTX 4090": "RTX4090",
    "L4": "L4",
    "L40S": "L40S",
    "A100 40 GB": "A100",
    "A100 80 GB": "A100-80GB",
    "H100 80 GB": "H100",
    "H200": "H200",
}

MACHINES: dict[str, dict[str, dict[int, tuple[str, int]]]] = {
    "aws": {
        "T4": {1: ("g4dn.2xlarge", 8), 4: ("g4dn.12xlarge", 48), 8: ("g4dn.metal", 96)},
        "L4": {1: ("g6.2xlarge", 8), 4: ("g6.12xlarge", 48), 8: ("g6.48xlarge", 192)},
        "L40S": {1: ("g6e.2xlarge", 8), 4: ("g6e.12xlarge", 48), 8: ("g6e.48xlarge", 192)},
        "A100 40 GB": {8: ("p4d.24xlarge", 96)},
        "A100 80 GB": {8: ("p4de.24xlarge", 96)},
        "H100 80 GB": {1: ("p5.4xlarge", 16), 8: ("p5.48xlarge", 192)},
        "H200": {8: ("p5en.48xlarge", 192)},
    },
    "gcp": {
        "L4": {
            1: ("g2-standard-8", 8),
            2: ("g2-standard-24", 24),
            4: ("g2-standard-48", 48),
            8: ("g2-standard-96", 96),
        },
        "A100 40 GB": {n: (f"a2-highgpu-{n}g", 12 * n) for n in (1, 2, 4, 8)},
        "A100 80 GB": {n: (f"a2-ultragpu-{n}g", 12 * n) for n in (1, 2, 4, 8)},
        "H100 80 GB": {n: (f"a3-highgpu-{n}g", 26 * n) for n in (1, 2, 4, 8)},
        "H200": {8: ("a3-ultragpu-8g", 224)},
    },
}
"""By provider, GPU and GPUs of a machine: its type and its virtual cores."""

DISK = "pd-balanced"
"""What most of Google's machines with GPUs start from; without a word they would be given a disk that G2 and A3 refuse
(Compute Engine, Disks, machine series support)."""

DISKS = {"H200": "hyperdisk-balanced"}
"""By GPU, of machines that take no other."""


def find_gpu(wanted: str) -> str:
    """The GPU of the planner that is meant: 'a100-80gb' is 'A100 80 GB', 'h100' is 'H100 80 GB'.

    Raises:
        InputError: there is none, or more than one.
    """
    plain = _plain(wanted)
    found = [name for name in NAMES if _plain(name) == plain] or [
        name for name in NAMES if _plain(name).startswith(plain)
    ]
    if not plain or len(found) != 1:
        raise InputError(f"--gpu: found {wanted!r}; allowed: {', '.join(NAMES)}")
    return found[0]


def find_machine(provider: str, gpu: str, count: int) -> tuple[str, int]:
    """Type and virtual cores of the machine with `count` of a GPU.

    Raises:
        InputError: the provider has no such machine.
    """
    sold = MACHINES[provider]
    if gpu not in sold:
        raise InputError(f"--gpu: found {gpu!r}; allowed on {provider}: {', '.join(sold)}")
    if count not in sold[gpu]:
        allowed = ", ".join(map(str, sold[gpu]))
        raise InputError(f"--gpus-per-node: found {count}; allowed on {provider} with {gpu}: {allowed}")
    return sold[gpu][count]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
