"""Machines whose clocks are ten minutes off: libfaketime, of Debian's package of that name, sets a process's clock."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_store import Store, server, store  # noqa: F401  # fixtures

from lora_search.lease import LEASE, LEASE_S, leased
from lora_search.storage import Folder

OFF_S = 600
BOTH = (OFF_S, -OFF_S)


def clock(off_s: int) -> dict[str, str]:
    """Of the environment of a process whose clock is so many seconds off; files keep their times."""
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not libraries:
        pytest.skip("needs libfaketime, of Debian's package faketime")
    once = dict.fromkeys(("FAKETIME_DONT_RESET", "NO_FAKE_STAT"), "1")
    return {"LD_PRELOAD": str(libraries[0]), "FAKETIME": f"{off_s:+d}s", **once}


def answer(off_s: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | clock(off_s), timeout=120)


@pytest.fixture(autouse=True)
def _clocks_are_off() -> None:
    """The tests here show nothing where the clock that they set is not set."""
    for off_s in BOTH:
        said = answer(off_s, "-c", "import time; print(time.time())").stdout
        assert abs(float(said) - time.time() - off_s) < 60


TAKE = """
import sys, time
from lora_search.errors import InputError
from lora_search.lease import is_leased, leased
from lora_search.storage import Folder
folder = Folder(sys.argv[1])
print(is_leased(folder))
try:
    with leased(folder):
        print("taken", flush=True)
        time.sleep(float(sys.argv[2]))
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("off_s", BOTH)
def test_lease_is_not_stolen_by_a_machine_whose_clock_is_off(store: Store, tmp_path: Path, off_s: int) -> None:  # noqa: F811
    folder = Folder(store.uri(f"leases/{tmp_path.name}"))
    with leased(folder) as held:
        assert answer(off_s, "-c", TAKE, folder.place, "0").stdout.splitlines() == [
            "True",
            f"{folder.place}: another lora-search run is writing to it",
        ]
        time.sleep(4)
        assert held()
    assert answer(off_s, "-c", TAKE, folder.place, "0").stdout.splitlines() == ["False", "taken"]


@pytest.mark.slow
@pytest.mark.parametrize("off_s", BOTH)
def test_lease_of_a_killed_machine_whose_clock_was_off_is_free_after_its_time(
    store: Store,  # noqa: F811
    tmp_path: Path,
    off_s: int,
) -> None:
    folder = Folder(store.uri(f"leases/{tmp_path.name}"))
    command = [sys.executable, "-c", TAKE, folder.place, "100"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | clock(off_s))
    assert holder.stdout
    assert [holder.stdout.readline().strip() for _ in range(2)] == ["False", "taken"]
    holder.kill()
    holder.communicate()
    assert LEASE in folder.names()
    began = time.monotonic()
    with leased(folder) as held:
        assert LEASE_S / 2 < time.monotonic() - began < 3 * LEASE_S
        assert held()
