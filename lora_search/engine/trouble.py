"""Whose an error is that a step ended in: a trial's, the memory's, or the device's."""

from __future__ import annotations

import math

import torch

from lora_search.errors import OUT_OF_MEMORY, HostFailed, TrialFailed

DEVICE_ERRORS = ("CUDA error", "cuBLAS", "CUBLAS_STATUS", "cuDNN error", "NCCL error", "HIP error")
"""How errors begin after which a device answers every call with the same one."""


def require_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise TrialFailed(f"{what} is {value} at step {step}")


def too_large(step: int, where: str) -> TrialFailed:
    return TrialFailed(f"{OUT_OF_MEMORY} at step {step}, with no other trial in the pass: {where}")


def in_words(error: Exception) -> str:
    """The error in a line, where it is a trial's.

    Raises:
        HostFailed: it is the device's: CUDA answers every call after such an error with the same one.
    """
    line = str(error).partition("\n")[0]
    if is_out_of_memory(error):
        return line
    if isinstance(error, torch.AcceleratorError) or line.startswith(DEVICE_ERRORS):
        raise HostFailed(f"{type(error).__name__}: {line}") from error
    return f"{type(error).__name__}: {line}"


def is_out_of_memory(error: BaseException) -> bool:
    """Torch says it in a class of its own on a GPU, and in words on a CPU, as cuBLAS and the CUDA driver do."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)
