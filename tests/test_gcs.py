"""A run directory in Google's object store, by an emulator of it: what a folder of ours asks of a store works there."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_spec, require_gives_back

from lora_search.checkpoint import ADAPTER_WEIGHTS, Shelf, seal
from lora_search.cli.main import main
from lora_search.errors import InputError
from lora_search.lease import is_leased, leased
from lora_search.rundir import create_run, find_run
from lora_search.spec import SweepSpec
from lora_search.storage import Folder
from lora_search.sweep.run import run_sweep

BUCKET = "lora-search-test"

EMULATOR = """
import time
from gcp_storage_emulator.server import create_server
with create_server("127.0.0.1", 0, True) as server:
    print(server._api._httpd.server_port, flush=True)
    time.sleep(10**6)
"""
"""On a port that is free: where it is told one that has been taken since, it waits for ever."""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URI of a bucket, up to the folder's name, and what comes after that."""
    pytest.importorskip("gcp_storage_emulator", reason="needs gcp-storage-emulator for a Google object store")
    process = subprocess.Popen([sys.executable, "-c", EMULATOR], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout
        port = int(process.stdout.readline())
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/storage/v1/b?project=test",
            data=json.dumps({"name": BUCKET}).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=30).close()
        yield f"gs://anonymous@{BUCKET}/{{}}?endpoint_override=127.0.0.1%3A{port}&scheme=http&retry_limit_seconds=3"
    finally:
        process.kill()
        process.wait()


def test_folder_gives_back_what_it_was_given(bucket: str, tmp_path: Path) -> None:
    require_gives_back(Folder(bucket.format("folder"), patience_s=0), tmp_path)


def test_checkpoints_are_kept_and_a_damaged_one_is_passed_over(bucket: str) -> None:
    run = Folder(bucket.format("shelf"), patience_s=0)
    shelf = Shelf(run, 3)
    for step in (2, 4, 6):
        shelf.put(seal({ADAPTER_WEIGHTS: b"weights"}, {"step": step}), {"rank": 8}, [{"step": step}])
    assert run.below("tune/trial-0003").names() == ["checkpoint_000004", "checkpoint_000006"]
    run.below("tune/trial-0003/checkpoint_000006").write(ADAPTER_WEIGHTS, b"others")
    saved = shelf.newest()
    assert saved is not None
    assert (saved.reports, len(saved.damaged)) == ([{"step": 4}], 1)


def test_lease_is_held_by_one(bucket: str) -> None:
    folder = Folder(bucket.format("lease"), patience_s=0)
    with leased(folder):
        assert is_leased(folder)
        with pytest.raises(InputError, match="another lora-search run is writing to it"), leased(folder):
            pass
    assert not is_leased(folder)


def test_missing_bucket_is_said(bucket: str) -> None:
    with pytest.raises(InputError, match=r"output: found .*cannot be written to"):
        create_run(bucket.format("x").replace(BUCKET, "no-such-bucket"), "a", exact=False)


@pytest.mark.slow
def test_sweep_lives_whole_in_the_store_and_goes_on_there(
    bucket: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spec_of(trials: int) -> SweepSpec:
        search = {"trials": trials, "scheduler": {"name": "none"}}
        hosts = {"count": 1, "trials_per_host": 1}
        return make_spec(tiny, name="whole", hosts=hosts, search=search, output=bucket.format("runs"))

    uri = bucket.format("runs/whole")
    spec = spec_of(2)
    first = run_sweep(spec, create_run(spec.output, spec.name, exact=True))
    names = {"sweep.yaml", "provenance.json", "trials.jsonl", "study.journal", "report.html", "best", "tune"}
    assert set(Folder(uri).names()) == names
    second = run_sweep(spec_of(3), find_run(uri), resume=True)
    assert [row["trial"] for row in second.rows] == [0, 1, 2]
    assert second.rows[:2] == first.rows
    assert {"config.json", "model.safetensors"} <= set(Folder(uri).below("best").below("merged").names())
    capsys.readouterr()
    assert main(["results", uri, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(second.rows))
