"""This machine: its memory, or what of it this process may have: a container's or a Slurm job's limit counts.

Of Linux's control groups, version 1 and 2 (Linux, Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Of glibc's mallopt(3)."""

HEAPS = 2

FREE_BYTES, MAPPED_BYTES = (1 << 31) - 1, 32 << 20
"""What a heap's free end may come to before it is given back, and from which size on an allocation is apart from the
heaps: the most that glibc takes of either."""

LOGICAL_GPUS = "LORA_SEARCH_LOGICAL_GPUS"


@dataclass(frozen=True)
class _Limit:
    """Of one control group."""

    most: int
    used: int
    """Without what the kernel drops as soon as somebody needs room: its cache of files."""


def gpus_are_logical() -> bool:
    """Whether Ray's GPUs may be none that torch trains on: a Mac's, and in tests names alone."""
    return os.environ.get(LOGICAL_GPUS) == "1" or sys.platform == "darwin"


def unseen_gpus(given: int, seen: int) -> str:
    """What is wrong where Ray gives more GPUs than torch sees."""
    return (
        f"Ray says that it has {given} GPU{'s' * (given > 1)}, and torch sees {seen or 'none'}: look at NVIDIA's "
        "driver, and at what the container was started with (--gpus all); hosts.gpus_per_host: 0 trains on the cores"
    )


def memory_bytes() -> int:
    """What this process and all others in its container or job may hold together."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(limit.most for limit in _limits())])


def free_memory_bytes() -> int | None:
    """What can be had without swapping, and without being killed; None where the system does not tell."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = dict(line.split(":", 1) for line in lines)
    if "MemAvailable" not in found:
        return None
    available = int(found["MemAvailable"].split()[0]) * 1024
    return min([available, *(max(0, limit.most - limit.used) for limit in _limits())])


def _limits() -> Iterator[_Limit]:
    """Of the groups that this process is in, and of those around them: each holds."""
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            root = GROUPS
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = GROUPS / "memory"
        else:
            continue
        own = PurePosixPath(path)
        for group in (own, *own.parents):  # within a container, only the last of them may be there to see
            limit = _limit(root / str(group).lstrip("/"), *names)
            if limit is not None:
                yield limit


def _limit(group: Path, most: str, used: str, cache: str) -> _Limit | None:
    """None where a group has none, or cannot be read."""
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return _Limit(_number(group / most), max(0, _number(group / used) - int(stat.get(cache, 0))))
    except (OSError, ValueError):  # "max" is no number
        return None


def _number(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))


def share_heaps() -> None:
    """Let this process's threads share two heaps: glibc gives each its own, and what one has free no other can use."""
    _tell_allocator(M_ARENA_MAX, HEAPS)


def keep_heaps() -> None:
    """Keep what is freed for what is allocated next.

    Glibc gives a pass's activations back to the system when they are freed, and has them again, page by page, for the
    next pass: 10,000 to 12,000 page faults a step of four trials of the demo, an eighth of its time
    (analysis/benchmarks/NOTES.md). A process that has had so much memory will want it again.
    """
    share_heaps()  # a thread's own is given back however much of it may stay
    if _tell_allocator(M_MMAP_THRESHOLD, MAPPED_BYTES):  # the other one alone makes every tensor a mapping of its own
        _tell_allocator(M_TRIM_THRESHOLD, FREE_BYTES)


def give_back_heaps() -> None:
    """Give what is free of this process's heaps back to the system."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _tell_allocator(parameter: int, value: int) -> bool:
    """Whether it has listened."""
    try:
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    except (OSError, AttributeError):
        return False
