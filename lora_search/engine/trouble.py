"""Whose an error is that a step ended in: a trial's, the memory's, or the device's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lora_search.errors import OUT_OF_MEMORY, HostFailed, TrialFailed

DEVICE_ERRORS = (
    "CUDA error",
    "cuBLAS",
    "CUBLAS_STATUS",
    "cuDNN error",
    "NCCL error",
    "HIP error",
    "Triton Error [CUDA]",
)
"""How errors begin after which a device answers every call with the same one."""


NO_THREAD = "can't start new thread"
"""What Python says of a machine that has no more of them."""

LASTING = ("no kernel image", "kernel image is invalid", "invalid device function", "NOT_SUPPORTED")
"""What such an error says where the device is sound, and cannot do what is asked: no other would."""


Failure = TrialFailed | HostFailed
"""What a trial may be told in place of a result: the second where it may go on elsewhere, or here a little later."""


def require_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise TrialFailed(f"{what} is {value} at step {step}")


@dataclass(frozen=True)
class Trouble:
    """An error that is a trial's, or its memory's."""

    words: str
    memory: bool

    def failure(self, step: int) -> TrialFailed:
        """Of a trial that had it with no other in the pass."""
        if self.memory:
            return TrialFailed(f"{OUT_OF_MEMORY} at step {step}, with no other trial in the pass: {self.words}")
        return TrialFailed(f"{self.words} at step {step}")

    def of_company(self, step: int, residents: int) -> HostFailed:
        """Of a trial that finds too little memory beside others: by itself it may find enough."""
        return HostFailed(f"{OUT_OF_MEMORY} at step {step}, with {residents} trials resident: {self.words}")


def trouble_of(error: Exception) -> Trouble:
    """What a pass of one or several trials ended in.

    Raises:
        HostFailed: it is the device's: CUDA answers every call after such an error with the same one. Or the machine's:
            its disk is full, where Triton compiles, or it has no more files or threads to give.
    """
    line = str(error).partition("\n")[0]
    if is_out_of_memory(error):
        return Trouble(line, memory=True)
    if isinstance(error, OSError) or NO_THREAD in line:
        raise HostFailed(f"{type(error).__name__}: {line}") from error
    _require_device(error)
    return Trouble(f"{type(error).__name__}: {line}", memory=False)


@contextmanager
def device_fails_host() -> Iterator[None]:
    """
    Raises:
        HostFailed: in place of an error that is the device's; any other comes through as it is.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            _require_device(error)
        raise


def _require_device(error: Exception) -> None:
    line = str(error).partition("\n")[0]
    if any(words in line for words in LASTING):
        return
    if isinstance(error, torch.AcceleratorError) or line.startswith(DEVICE_ERRORS):
        raise HostFailed(f"{type(error).__name__}: {line}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Torch says it in a class of its own on a GPU, and in words on a CPU, as cuBLAS and the CUDA driver do."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds; outside of the handler, whose exception holds the failed pass's tensors."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
