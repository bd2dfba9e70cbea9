"""What doctor says of a node whose storage is not that of this machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lora_search.doctor import Check, _marked, _node, look_at_node
from lora_search.placement import Node


def looked(output: Path, mark: str | None) -> Check:
    return _node(Node("1234567890", 8, 0), look_at_node(str(output), mark), time.time())


def test_node_that_does_not_see_what_the_driver_has_written_is_wrong(tmp_path: Path) -> None:
    shared, its_own = tmp_path / "shared", tmp_path / "its_own"
    with _marked(str(shared)) as mark:
        assert mark is not None
        assert looked(shared, mark).state == "ok"
        found = looked(its_own, mark)
    assert found.state == "wrong"
    assert found.found.endswith(f": output {its_own}: it does not see there what this machine has written")
    assert list(shared.iterdir()) == []


def test_node_is_not_asked_for_what_the_driver_could_not_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with _marked(str(tmp_path / "file")) as mark:
        assert mark is None
    assert looked(tmp_path / "runs", mark).state == "ok"


@pytest.mark.parametrize("mark", [None, "version"])  # /proc has a file of that name
def test_node_that_cannot_write_to_the_output_is_wrong(mark: str | None) -> None:
    found = looked(Path("/proc"), mark)
    assert found.state == "wrong"
    assert ": output /proc: " in found.found
    assert "it does not see" not in found.found


def test_node_where_a_file_stands_in_place_of_the_output_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    found = looked(tmp_path / "runs", None)
    assert found.state == "wrong"
    assert f": output {tmp_path / 'runs'}: " in found.found
