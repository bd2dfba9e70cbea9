"""Devices that a sweep may run on: this machine's own, and well-known GPUs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from lora_search.memory.gauge import GAPS, usable_bytes
from lora_search.placement import HostPlace

MIB = 1 << 20

CONTEXT_BYTES = 512 * MIB
"""What CUDA takes of a GPU for itself, with its kernels loaded."""

UTILISATION = {"cuda": 0.35, "cpu": 0.35}
"""Share of a device's rate at matrix products that a sweep reaches: de-quantising, norms, attention, dropout and the
optimiser run beside them."""

PASS_SECONDS = {"cuda": 8e-6, "cpu": 0.0}
"""From one kernel to the next at best: small models wait for launches, not for products."""

LAYER_KERNELS, SITE_KERNELS = 120, 14
"""Kernels of a pass for each layer, and for each layer that trials adapt, forward and backward: all trials of a pack
share them."""

PRODUCT_SIZE = 1024
MEASURE_SECONDS = 0.25


@dataclass(frozen=True)
class Device:
    """A GPU, or the share of a machine's cores and memory that one host has."""

    name: str
    kind: Literal["cpu", "cuda"]
    memory: int
    """Bytes, as the driver or the system says."""
    compute: str
    """Dtype that `compute_dtype: auto` chooses there."""
    flops: float
    """Dense products a second in that dtype, two operations for each multiplication and addition."""
    lanes: int = 1
    here: bool = False

    @property
    def usable(self) -> int:
        """Bytes that a host may plan with."""
        if self.kind == "cpu":
            return self.memory
        return int((self.memory - CONTEXT_BYTES) * (1 - GAPS))


GPUS = (
    Device("T4", "cuda", 15_109 * MIB, "float32", 8.1e12),
    Device("RTX 4090", "cuda", 24_210 * MIB, "bfloat16", 165e12),
    Device("L4", "cuda", 22_690 * MIB, "bfloat16", 60e12),
    Device("L40S", "cuda", 45_590 * MIB, "bfloat16", 362e12),
    Device("A100 40 GB", "cuda", 40_440 * MIB, "bfloat16", 312e12),
    Device("A100 80 GB", "cuda", 81_150 * MIB, "bfloat16", 312e12),
    Device("H100 80 GB", "cuda", 81_000 * MIB, "bfloat16", 989e12),
    Device("H200", "cuda", 143_100 * MIB, "bfloat16", 989e12),
)
"""Memory as torch finds it, dense rate as the makers state it. A T4 has no bfloat16, so that `auto` is float32."""


def gpu_count() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def this_machine(compute_dtype: str, place: HostPlace, trials: int) -> Device:
    """What one host of a sweep has on this machine.

    Args:
        compute_dtype: of the sweep file.
        trials: that the host may have at most.
    """
    import torch

    from lora_search.model.precision import compute_dtype as chosen

    if place.gpus:
        properties = torch.cuda.get_device_properties(0)
        dtype = _name(chosen(compute_dtype, torch.device("cuda", 0)))
        known = [gpu for gpu in GPUS if gpu.name.split()[0] in properties.name]
        flops = known[0].flops if known else 100e12
        return Device(properties.name, "cuda", properties.total_memory, dtype, flops, here=True)
    dtype = _name(chosen(compute_dtype, torch.device("cpu")))
    threads = place.threads
    memory = usable_bytes([torch.device("cpu")], place.neighbours, trials)
    name = f"a host here ({threads} core{'s' * (threads > 1)})"
    return Device(name, "cpu", memory, dtype, _measured_flops(dtype) * threads, threads, here=True)


def _measured_flops(dtype: str) -> float:
    """One core's rate at square products, in a quarter of a second."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=getattr(torch, dtype))
        x @ x
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < MEASURE_SECONDS:
            x @ x
            count += 1
        return 2.0 * PRODUCT_SIZE**3 * count / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
