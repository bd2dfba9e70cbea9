"""What is made ready for the merge while the last trials run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from conftest import make_spec

from lora_search.best import conclude, merge_ahead
from lora_search.merge import BESIDE, begin_ahead, end_ahead, verify
from lora_search.merge.verify import FreshProcess
from lora_search.spec import Base
from lora_search.sweep.ahead import MergeAhead

BASE, CPU = Base(model="builtin:demo"), torch.device("cpu")


@pytest.fixture
def nothing_begun() -> Iterator[None]:
    end_ahead()
    yield
    end_ahead()


def begun() -> list[int]:
    return [one.process.pid for one in verify._ahead]


@pytest.mark.parametrize("past", [0, 2])
def test_host_that_merges_makes_ready_once_when_another_has_no_trial_any_more(tiny: Path, past: int) -> None:
    """Of five trials on two hosts, some of which an earlier process had run."""
    hosts = MagicMock(places=("host-0", "host-1"))
    ahead = MergeAhead(make_spec(tiny, search={"trials": 5}), hosts)
    ahead.past([{"state": "stopped"}] * past + [{"state": "running"}] * past)
    told = {}
    for left in reversed(range(5 - past)):
        ahead.trial_ended(4 - left, "completed", None)
        told[left] = hosts.ask_last.call_count
    assert {left for left, times in told.items() if times} == {1, 0}
    hosts.ask_last.assert_called_once_with(merge_ahead)


@pytest.mark.usefixtures("nothing_begun")
def test_process_that_was_begun_ahead_is_asked_and_no_other_is_begun() -> None:
    begin_ahead()
    begin_ahead()
    [waiting] = begun()
    with FreshProcess(BASE, CPU) as first:
        assert first._process.pid == waiting
        with FreshProcess(BASE, CPU) as second:
            assert second._process.pid != waiting
    assert first._process.returncode is not None


@pytest.mark.usefixtures("nothing_begun")
def test_process_that_died_while_it_waited_is_replaced() -> None:
    begin_ahead()
    [dead] = begun()
    verify._ahead[0].process.kill()
    verify._ahead[0].process.wait()
    with FreshProcess(BASE, CPU) as process:
        assert process._process.pid != dead
        assert process._process.poll() is None
    assert not begun()


@pytest.mark.usefixtures("nothing_begun")
def test_process_that_waits_ends_with_who_began_it() -> None:
    """Its pipe closes with that process, however that one ends."""
    begin_ahead()
    process = verify._ahead[0].process
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=120) == 0
    process.stdin = None


@pytest.mark.usefixtures("nothing_begun")
@pytest.mark.parametrize(("free", "begins"), [(BESIDE - 1, False), (BESIDE, True), (None, True)])
def test_nothing_is_begun_that_would_take_memory_from_trials(
    monkeypatch: pytest.MonkeyPatch, free: int | None, begins: bool
) -> None:
    monkeypatch.setattr(conclude, "free_memory_bytes", lambda: free)
    merge_ahead()
    assert bool(begun()) == begins
