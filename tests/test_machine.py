"""What memory there is: the machine's, or less where a container or a job has a limit."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch

from lora_search import machine, open_run
from lora_search.machine import free_memory_bytes, memory_bytes
from lora_search.memory.gauge import BESIDE_BYTES, SEAT_BYTES, usable_bytes

GIB = 1 << 30


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n", encoding="ascii")


def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str) -> Path:
    """Control groups of our own making, of which this process is said to be in `own`."""
    (tmp_path / "own").write_text(own, encoding="ascii")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")
    return tmp_path / "groups"


def test_least_limit_around_a_process_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    groups = pretend(monkeypatch, tmp_path, "0::/job_7/step_0\n")
    used = {"memory__current": GIB // 2, "memory__stat": f"anon 1\ninactive_file {GIB // 4}"}
    group(groups / "job_7", memory__max=GIB, **used)
    group(groups / "job_7" / "step_0", memory__max="max", **used)
    assert memory_bytes() == GIB
    assert free_memory_bytes() == GIB * 3 // 4


def test_every_seat_that_a_host_may_have_leaves_it_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """16 trials of a host of four threads have 16 seats."""
    groups = pretend(monkeypatch, tmp_path, "0::/job\n")
    group(groups / "job", memory__max=GIB * 4, memory__current=0, memory__stat="inactive_file 0")
    cpu = [torch.device("cpu")]
    assert usable_bytes(cpu, 2, 16) == usable_bytes(cpu, 2, 4) - 12 * SEAT_BYTES
    assert usable_bytes(cpu, 1, 4) == 4 * GIB - BESIDE_BYTES - 4 * SEAT_BYTES


def test_limit_of_the_first_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a container, the group's own name is the host's, and its files stand at the top."""
    groups = pretend(monkeypatch, tmp_path, "5:cpuset:/docker/1f\n4:memory,hugetlb:/docker/1f\n0::/\n")
    stat = f"inactive_file 7\ntotal_inactive_file {GIB // 4}"
    group(groups / "memory", memory__limit_in_bytes=GIB, memory__usage_in_bytes=GIB * 2, memory__stat=stat)
    assert memory_bytes() == GIB
    assert free_memory_bytes() == 0


def test_without_a_limit_it_is_the_machine_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    groups = pretend(monkeypatch, tmp_path, "4:memory:/\n")
    group(groups / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=1, memory__stat="cache 0")
    physical = memory_bytes()
    assert physical > GIB
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "none")
    assert memory_bytes() == physical
    assert 0 < (free_memory_bytes() or 0) < physical


def limited_group(most: int) -> Path:
    """A control group of this machine; skips the test where none can be made."""
    for root, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        made = Path(root) / f"lora-search-{uuid.uuid4().hex}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            (made / file).write_text(str(most), encoding="ascii")
            return made
        except OSError:
            made.rmdir()
    pytest.skip("no control group can be made here: not root, or read-only")


def test_real_limit() -> None:
    """A process in a control group with 2 GiB, of which it holds 512 MiB."""
    limited = limited_group(2 * GIB)
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); held = bytes(512 << 20).replace(b'\\0', b'x');"
        "from lora_search.machine import *; print(memory_bytes(), free_memory_bytes())"
    )
    try:
        command = [sys.executable, "-c", code, str(limited / "cgroup.procs")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    finally:
        limited.rmdir()
    total, free = map(int, done.stdout.split())
    assert total == 2 * GIB
    assert 0.9 * GIB < free < 1.55 * GIB


HEAPS = """
import gc, resource, sys
from lora_search import machine

def passes(count):
    for _ in range(count):
        held = [bytes([65]) * (1 << 20) for _ in range(200)]
        del held

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

if sys.argv[1] == "kept":
    machine.keep_heaps()
passes(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
passes(5)
faults, held = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, resident()
machine.give_back_heaps()
print(faults, held, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_freed_is_kept_for_the_next_pass_until_it_is_given_back() -> None:
    def said(how: str) -> list[int]:
        command = [sys.executable, "-c", HEAPS, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return [int(number) for number in done.stdout.split()]

    (faults, held, _), (kept_faults, kept_held, given_back) = said("as it is"), said("kept")
    assert kept_faults * 20 < faults
    assert kept_held - held > 150 << 20
    assert kept_held - given_back > 150 << 20


@pytest.mark.slow
def test_sweep_keeps_to_the_limit_of_its_container(tmp_path: Path) -> None:
    """Each of two hosts has room for one trial, where it would have two at once in the memory of a larger machine."""
    limited = limited_group(4 * GIB)
    big = {"path": "builtin:demo", "limit": 500, "max_length": 96}
    sweep = {
        "name": "limited",
        "data": big,
        "search": {
            "space": {"rank": {"choice": [8, 10, 12, 16]}, "dropout": 0.1},
            "trials": 4,
            "scheduler": {"name": "none"},
        },
        "training": {"steps": 6, "batch_size": 64, "eval_every": 3},
        "hosts": {"count": 2, "cpus_per_host": 1},
        "tracking": {"wandb": {"mode": "disabled"}},
        "output": str(tmp_path / "runs"),
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep), encoding="utf-8")
    code = (
        "import os, sys; open(sys.argv.pop(1), 'w').write(str(os.getpid()));"
        "from lora_search.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(limited / "cgroup.procs"), "run", str(tmp_path / "sweep.yaml")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    finally:
        for process in (limited / "cgroup.procs").read_text().split():
            os.kill(int(process), signal.SIGKILL)
        time.sleep(1)
        limited.rmdir()
    assert done.returncode == 0, done.stderr
    assert "was lost" not in done.stderr
    run = open_run(tmp_path / "runs" / "limited")
    usable = (4 * GIB - BESIDE_BYTES) // 2 - 4 * SEAT_BYTES
    assert list(run.trials["state"]) == ["completed"] * 4
    assert run.trials["peak_memory_bytes"].max() < usable < run.trials["peak_memory_bytes"].max() * 1.5
