"""A sweep whose run directory is in an object store: a real S3 server on this machine, which misbehaves on command."""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import pandas as pd
import pytest
import yaml
from conftest import PATIENCE, make_spec, require_gives_back, wait_until
from test_faults import SEARCH, SEQUENTIAL, TRIALS, Strikes, compared, kill, require_whole, without_faults

from lora_search.checkpoint import ADAPTER_WEIGHTS, Shelf, seal
from lora_search.cli.main import main
from lora_search.errors import InputError, SweepError
from lora_search.lease import LEASE, leased
from lora_search.results import Row, run_rows
from lora_search.rundir import RunDirectory, create_run, find_run, newest_run, newest_run_of_job
from lora_search.spec import dump_spec, load_spec
from lora_search.storage import REFUSED, Folder, StoreError
from lora_search.sweep.prepare import DataSummary
from lora_search.sweep.provenance import provenance, write_provenance
from lora_search.sweep.run import Outcome, run_sweep
from lora_search.sweep.upload import kept_uploaded
from lora_search.tracking import Observer

if TYPE_CHECKING:
    from lora_search.spec import SweepSpec

BUCKET = "lora-search-test"

Fault = Callable[[BaseHTTPRequestHandler], str]
"""Answers a request in place of the store, and says how; says nothing where it does not."""

NO_ANSWER = "none in time"


class Store:
    """A proxy before an S3 server, which can answer 500, or hang, or refuse, in place of it."""

    def __init__(self, server: tuple[str, int]) -> None:
        self.fault: Fault = fine
        self.faults: Counter[str] = Counter()
        """By what was answered."""
        store = self

        class Proxy(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                content = self.body()
                if answered := store.fault(self):
                    store.faults[answered] += 1
                    return
                server_connection = http.client.HTTPConnection(*server)
                left_out = ("expect", "transfer-encoding", "content-length")
                headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
                server_connection.request(self.command, self.path, content, headers)
                answer = server_connection.getresponse()
                found = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(found)))
                self.end_headers()
                self.wfile.write(found)
                server_connection.close()

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                content = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                return content

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

            def log_message(self, *values: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def uri(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}?endpoint_override=127.0.0.1:{self._server.server_port}&scheme=http"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def fine(request: BaseHTTPRequestHandler) -> str:
    return ""


def status(code: int) -> Fault:
    def answer(request: BaseHTTPRequestHandler) -> str:
        request.send_response(code)
        request.send_header("Content-Length", "0")
        request.end_headers()
        return str(code)

    return answer


def hang(request: BaseHTTPRequestHandler) -> str:
    time.sleep(5)
    request.close_connection = True
    return NO_ANSWER


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """A moto process of its own, with a bucket."""
    pytest.importorskip("moto.server", reason="needs moto and flask, of the extra `dev`, for an S3 server")
    code = (
        "import sys, time, logging; logging.getLogger('werkzeug').setLevel(logging.ERROR)\n"
        "from moto.server import ThreadedMotoServer\n"
        "server = ThreadedMotoServer('127.0.0.1', 0, verbose=False); server.start()\n"
        "print(server.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    port = next(int(line) for line in process.stdout if line.strip().isdigit())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        from pyarrow.fs import S3FileSystem

        S3FileSystem(endpoint_override=f"127.0.0.1:{port}", scheme="http", allow_bucket_creation=True).create_dir(
            BUCKET
        )
        yield "127.0.0.1", port
    process.kill()
    process.wait()


@pytest.fixture
def store(server: tuple[str, int]) -> Iterator[Store]:
    store = Store(server)
    yield store
    store.close()


@pytest.fixture(scope="module")
def ray(server: tuple[str, int]) -> Iterator[Any]:
    import ray

    from lora_search.sweep.cluster import cluster

    with cluster(None):
        yield ray


class Second(Observer):
    """Starts the same sweep again while it runs."""

    def __init__(self, spec: SweepSpec) -> None:
        self._spec = spec
        self.refused = ""

    def trial_reported(self, trial: int, report: Mapping[str, Any]) -> None:
        if not self.refused:
            wait_until(lambda: newest_run(self._spec.output, self._spec.name) is not None)  # has been uploaded
            left = newest_run(self._spec.output, self._spec.name)
            assert left is not None
            try:
                run_sweep(self._spec, left, resume=True)
            except InputError as error:
                self.refused = str(error)


@dataclass
class Kept:
    """A sweep in a store that failed for a while: it answered 500 while a trial trained, and hung while the trial's
    seat was killed and a new one had to read. And somebody started the same sweep a second time."""

    store: Store
    outcome: Outcome
    strikes: Strikes
    refused: str
    """What was said to the second."""
    faults: Counter[str]
    """Of the store, by what it answered."""
    best: list[str]
    """What `best/` held there when the sweep was first said to have come to its end: it may be killed then."""


@pytest.fixture(scope="module")
def kept(ray: Any, server: tuple[str, int], tiny: Path) -> Iterator[Kept]:
    store = Store(server)

    def fail(fault: Fault, seconds: float) -> None:
        store.fault = fault
        threading.Timer(seconds, lambda: setattr(store, "fault", fine)).start()

    def hang_and_kill() -> None:
        fail(hang, 5)
        kill("ray::Seat")

    spec = sequential(tiny, "whole", store.uri("runs"))
    second = Second(spec)
    strikes = Strikes({(0, 2): lambda: fail(status(500), 10), (0, 4): hang_and_kill})
    there: list[str] = []

    def when_it_says_that_it_is_finished(file: Path, facts: Mapping[str, Any]) -> None:
        if "conclusion" in facts:
            there.extend(Folder(spec.output).below("whole").below("best").names())
        write_provenance(file, facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_search.sweep.run.write_provenance", when_it_says_that_it_is_finished)
        outcome = run_sweep(spec, create_run(spec.output, spec.name, exact=True), [second, strikes])
    yield Kept(store, outcome, strikes, second.refused, store.faults, there)
    store.close()


@pytest.fixture(scope="module")
def undisturbed(ray: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return without_faults(tiny, tmp_path_factory)


def sequential(tiny: Path, name: str, output: str) -> SweepSpec:
    return make_spec(tiny, name=name, hosts=SEQUENTIAL, search=SEARCH, output=output)


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return Folder(tmp_path / "folder")
    store: Store = request.getfixturevalue("store")
    return Folder(store.uri(f"folders/{tmp_path.name}"))


def test_folder_gives_back_what_it_was_given(folder: Folder, tmp_path: Path) -> None:
    require_gives_back(folder, tmp_path)


def test_checkpoint_is_not_taken_for_damaged_because_the_store_fails(store: Store) -> None:
    run = Folder(store.uri("shelf"), patience_s=0)
    shelf = Shelf(run, 3)
    for step in (2, 4):
        shelf.put(seal({ADAPTER_WEIGHTS: b"weights"}, {"step": step}), {"rank": 8}, [{"step": step}])
    saved = shelf.newest()
    assert saved is not None
    assert (saved.parameters, saved.reports, saved.damaged) == ({"rank": 8}, [{"step": 4}], ())

    store.fault = lambda request: status(500)(request) if ADAPTER_WEIGHTS in request.path else ""
    with pytest.raises(StoreError, match="500"):
        shelf.newest()

    store.fault = fine
    run.below("tune/trial-0003/checkpoint_000004").remove(ADAPTER_WEIGHTS)
    saved = shelf.newest()
    assert saved is not None
    assert (saved.reports, len(saved.damaged)) == ([{"step": 2}], 1)

    run.below("tune/trial-0003/checkpoint_000002").remove(ADAPTER_WEIGHTS)
    saved = shelf.newest()
    assert saved is not None
    assert (saved.checkpoint, len(saved.damaged)) == (None, 2)


def test_job_that_is_started_again_finds_its_run_in_a_store(store: Store, tiny: Path) -> None:
    output = store.uri("jobs")
    spec = make_spec(tiny, name="ours", output=output)
    for number, job in enumerate(("a", "b", "a", "b", ""), start=1):
        run = create_run(output, spec.name, exact=False)
        assert run.name == ("ours" if number == 1 else f"ours-{number}")
        run.folder.write("sweep.yaml", dump_spec(spec).encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LORA_SEARCH_JOB", job)
            write_provenance(run.provenance, provenance(spec, {}))
        if number != 4:
            run.folder.write("provenance.json", run.provenance.read_bytes())  # which the fourth had not done yet
    found = {job: newest_run_of_job(output, spec.name, job) for job in ("a", "b", "c")}
    assert {job: run and run.name for job, run in found.items()} == {"a": "ours-3", "b": "ours-2", "c": None}
    exact = newest_run_of_job(output, spec.name, "a", exact=True)
    assert exact is not None
    assert exact.name == "ours"

    store.fault = lambda request: status(500)(request) if "provenance.json" in request.path else ""
    with pytest.raises(InputError, match="cannot be read"):  # it may well be ours
        newest_run_of_job(output, spec.name, "a")


def test_opening_a_store_is_tried_again_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a bucket's region is not given, pyarrow asks for it then."""
    from pyarrow import fs

    opened: list[str] = []

    class Failing:
        @staticmethod
        def from_uri(uri: str) -> Any:
            opened.append(uri)
            if len(opened) < 3:
                raise OSError("When resolving region for bucket 'a': AWS Error NETWORK_CONNECTION during HeadBucket")
            return real(uri)

    real = fs.FileSystem.from_uri
    monkeypatch.setattr(fs, "FileSystem", Failing)
    Folder(store.uri("opened")).write("a", b"kept")
    assert len(opened) == 3
    opened.clear()
    with pytest.raises(StoreError, match="When resolving region"):
        Folder(store.uri("opened"), patience_s=0).read("a")


def test_store_that_fails_is_asked_less_and_less_often_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to half of each pause is left to chance, so that not all who wait ask at once."""
    now, slept, shares = 0.0, [], []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        slept.append(seconds)

    def longest(*bounds: float) -> float:
        shares.append(bounds)
        return bounds[1]

    def fail(folder: Folder) -> Any:
        raise OSError("AWS Error SLOW_DOWN during PutObject operation: 503")

    monkeypatch.setattr("lora_search.storage.time", SimpleNamespace(sleep=sleep, monotonic=lambda: now))
    monkeypatch.setattr("lora_search.storage.random", SimpleNamespace(uniform=longest))
    monkeypatch.setattr(Folder, "_open", fail)
    with pytest.raises(StoreError, match="SLOW_DOWN"):
        Folder("s3://bucket/runs", patience_s=300).write("a", b"")
    assert slept == [0.5, 1, 2, 4, 8, 16, *[30] * 8]
    assert set(shares) == {(0.5, 1)}


def test_store_that_refuses_is_not_asked_again(store: Store) -> None:
    store.fault = status(403)
    began = time.monotonic()
    with pytest.raises(StoreError, match="ACCESS_DENIED"):
        Folder(store.uri("refused")).write("a", b"")
    assert time.monotonic() - began < 30  # to ask again takes 300


WRITING = "When initiating multiple part upload for key '{}/trials.jsonl' in bucket 'runs': "


@pytest.mark.parametrize(
    ("said", "stays"),
    [
        (WRITING + "AWS Error SLOW_DOWN during CreateMultipartUpload operation: reduce your request rate", False),
        (
            WRITING + "AWS Error UNKNOWN (HTTP status 500) during CreateMultipartUpload operation: No response body.",
            False,
        ),
        (
            WRITING + "AWS Error UNKNOWN (HTTP status 429) during CreateMultipartUpload operation: No response body.",
            False,
        ),
        (WRITING + "AWS Error NETWORK_CONNECTION during CreateMultipartUpload operation: curlCode: 7", False),
        (WRITING + "AWS Error SIGNATURE_DOES_NOT_MATCH during CreateMultipartUpload operation: the key", True),
        (WRITING + "AWS Error INVALID_ACCESS_KEY_ID during CreateMultipartUpload operation: the key", True),
        (WRITING + "AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation: it", True),
        (WRITING + "AWS Error UNKNOWN (HTTP status 403) during CreateMultipartUpload operation: ExpiredToken", True),
        ("Bucket 'runs' not found. To create buckets, enable the allow_bucket_creation option.", True),
        ("google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message of no {})", False),
        ("[Errno 13] google::cloud::Status(UNAUTHENTICATED: Permanent error, with a last message of who?)", True),
        ("[Errno 13] google::cloud::Status(PERMISSION_DENIED: Permanent error, with a last message of no)", True),
    ],
)
@pytest.mark.parametrize("name", ["TOKENIZER-lr", "ACCESS_KEY", "HTTP status 403", "lr"])
def test_fault_passes_or_stays_whatever_the_sweep_is_called(said: str, stays: bool, name: str) -> None:
    """As pyarrow 26 words them."""
    assert bool(REFUSED.search(said.format(name))) == stays


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("s3://AKIA:tops3cret@bucket/runs", "which looks like a URL with a password"),
        ("s3://bucket/runs?secret_key=tops3cret&scheme=http", "which looks like a URL with a secret"),
        ("tape://bucket/runs", "Unrecognized filesystem type"),
        ("s3://bucket/runs?colour=red", "Unexpected query parameter"),
        ("s3://bucket/runs?endpoint_override=127.0.0.1:9&scheme=http", "cannot be written to"),
    ],
)
def test_output_that_cannot_be_used_is_one_message_before_ray_starts(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, said: str
) -> None:
    file = tmp_path / "sweep.yaml"
    raw = sequential(tiny, "wrong", str(tmp_path)).model_dump(mode="json") | {"output": output}
    file.write_text(yaml.safe_dump(raw))
    assert main(["run", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "output: found" in error
    assert said in error
    assert "tops3cret" not in error


def test_missing_bucket_is_said(store: Store, tiny: Path) -> None:
    with pytest.raises(InputError, match=r"output: found .*NO_SUCH_BUCKET"):
        create_run(store.uri("x").replace(BUCKET, "no-such-bucket"), "a", exact=False)


def test_of_two_that_begin_at_once_one_gives_way_before_it_has_uploaded_anything(store: Store) -> None:
    """The other's lease arrives late, when the first has seen that it has its own."""
    found_free, first_has_it, gave_way = (threading.Event() for _ in range(3))

    class Late(Folder):
        def write(self, name: str, content: bytes) -> None:
            found_free.set()
            first_has_it.wait(PATIENCE)
            super().write(name, content)

    def begin(run: RunDirectory, folder: Folder, go_on: Callable[[Callable[[], bool]], None]) -> None:
        with leased(folder) as held, kept_uploaded(run, held):
            go_on(held)

    def until_taken_over(held: Callable[[], bool]) -> None:
        first.spec.write_text("the first's")
        first_has_it.set()
        wait_until(lambda: not held())

    def once_alone(held: Callable[[], bool]) -> None:
        gave_way.wait(PATIENCE)
        second.spec.write_text("the second's")

    first, second = (create_run(store.uri("runs"), "twins", exact=True) for _ in range(2))
    late = Late(second.folder.place)
    thread = threading.Thread(target=begin, args=(second, late, once_alone), daemon=True)
    thread.start()
    try:
        assert found_free.wait(PATIENCE)
        with pytest.raises(SweepError, match="another lora-search run has taken over"):
            begin(first, first.folder, until_taken_over)
        assert "sweep.yaml" not in first.folder.names()
    finally:
        gave_way.set()
    thread.join(PATIENCE)
    assert first.folder.read("sweep.yaml") == b"the second's"


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "copy"),
        (StoreError("s3://bucket/runs: AWS Error SLOW_DOWN"), "store"),
    ],
    ids=["the disk here is full", "the store fails"],
)
def test_what_cannot_be_written_to_is_named_for_what_it_is(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, place: str
) -> None:
    """The driver's records of a stored run lie in a folder of this machine first."""

    def fail(*arguments: object) -> None:
        raise error

    spec = sequential(tiny, "full", f"file://{tmp_path}/runs")
    run = create_run(spec.output, spec.name, exact=True)
    monkeypatch.setattr("lora_search.sweep.run._run", fail)
    where = {"copy": str(run.path), "store": run.place}[place]
    with pytest.raises(SweepError, match=f"^{re.escape(where)} cannot be written to: .*; mend it, then --resume$"):
        run_sweep(spec, run)


@pytest.mark.parametrize("phase", ["before the trials", "before the merge", "before the conclusion", "never"])
def test_run_that_another_has_taken_over_is_not_written_to_from_then_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Its driver had stood still for too long in that phase."""
    done: list[str] = []

    def told(name: str, answer: Any) -> Callable[..., Any]:
        return lambda *arguments, **named: done.append(name) or answer

    ends = {"before the trials": 1, "before the merge": 2, "before the conclusion": 3, "never": 9}[phase]
    hosts = MagicMock(facts={}, prepare=told("prepare", DataSummary(8, 1, 1, 80, 0, 0, 0, None, "of the data")))
    hosts.ask_all.return_value = []
    conclusion = MagicMock(to_dict=dict)
    rows = [{"trial": 0, "state": "completed", "eval_loss": 1.0}]
    replaced = {
        "Hosts": lambda *arguments: hosts,
        "search": told("search", rows),
        "conclude": told("conclude", conclusion),
    }
    replaced |= {"write_card": told("card", None), "cluster": lambda *arguments: nullcontext()}
    replaced |= {"locked": lambda run: nullcontext(lambda: len(done) < ends), "_report": told("report", None)}
    for name, replacement in replaced.items():
        monkeypatch.setattr(f"lora_search.sweep.run.{name}", replacement)
    spec = sequential(tiny, "taken", str(tmp_path))
    run = create_run(spec.output, spec.name, exact=True)
    if phase == "never":
        run_sweep(spec, run)
    else:
        with pytest.raises(SweepError, match="another lora-search run has taken over"):
            run_sweep(spec, run)
    assert done == ["prepare", "search", "conclude", "card", "report"][:ends]
    facts = json.loads(run.provenance.read_text())
    assert ("data" in facts, "conclusion" in facts) == (ends > 1, phase == "never")


def test_lease_that_another_had_and_gave_back_is_lost(tmp_path: Path) -> None:
    """Its holder had stood still for too long: what it writes from now on would undo the other's."""
    folder = Folder(tmp_path)
    with leased(folder) as held:
        folder.remove(LEASE)
        wait_until(lambda: not held())
    assert folder.names() == []


def test_copy_of_a_stored_run_goes_when_the_process_ends_unless_it_holds_offline_runs(store: Store) -> None:
    code = (
        "import sys\n"
        "from lora_search.rundir import create_run, locked\n"
        "from lora_search.sweep.upload import kept_uploaded\n"
        "run = create_run(sys.argv[1], 'copied', exact=False)\n"
        "with locked(run) as held, kept_uploaded(run, held): run.spec.touch()\n"
        "for name in sys.argv[2:]: (run.path / 'wandb' / name).mkdir(parents=True)\n"
        "print(run.path.is_dir(), run.path)"
    )
    for made, stays in (("run-online", False), ("offline-run-a", True)):
        command = [sys.executable, "-c", code, store.uri("copies"), made]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        there, path = answer.stdout.split()
        assert there == "True"
        assert Path(path).is_dir() is stays
    shutil.rmtree(Path(path).parent)


def test_sweep_whose_input_is_wrong_leaves_nothing_in_the_store(ray: Any, store: Store, tiny: Path) -> None:
    columns = {"columns": {"prompt": "question"}}
    spec = make_spec(tiny, name="impossible", hosts=SEQUENTIAL, data=columns, output=store.uri("wrong"))
    run = create_run(spec.output, spec.name, exact=True)
    with pytest.raises(InputError, match="question"):
        run_sweep(spec, run)
    assert Folder(store.uri("wrong")).names() == []
    assert not run.path.exists()


def test_sweep_lives_whole_in_the_store(
    kept: Kept, undisturbed: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = kept.store
    assert "another lora-search run is writing to it" in kept.refused
    uri = store.uri("runs/whole")
    assert {"sweep.yaml", "provenance.json", "trials.jsonl", "study.journal", "report.html", "best", "tune"} == set(
        Folder(uri).names()
    )
    best = Folder(uri).below("best")
    assert best.names() == ["README.md", "adapter", "config.yaml", "merged"]
    assert kept.best == best.names()
    assert ADAPTER_WEIGHTS in best.below("adapter").names()
    assert {"config.json", "model.safetensors"} <= set(best.below("merged").names())
    with pytest.raises(InputError, match="exists already"):
        create_run(store.uri("runs"), "whole", exact=True)
    assert create_run(store.uri("runs"), "whole", exact=False).name == "whole-2"

    capsys.readouterr()
    assert main(["status", uri, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["phase"], told["name"], told["path"]) == ("finished", "whole", uri)
    assert main(["results", uri, "--format", "json"]) == 0
    assert compared(json.loads(capsys.readouterr().out)) == undisturbed
    assert main(["merge", uri, "--trial", "0", "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "config.json").is_file()
    assert main(["results", store.uri("runs/none")]) == 2


def test_after_side_works_on_a_run_in_the_store(
    kept: Kept,
    undisturbed: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    store = kept.store
    uri = store.uri("runs/whole")
    run = Folder(uri)

    for form in ("table", "csv", "json", "parquet"):
        assert main(["results", uri, "--format", form, "--out", f"results.{form}"]) == 0
    frame = pd.read_parquet("results.parquet")
    assert frame["eval_loss"].tolist() == [row["eval_loss"] for row in undisturbed]

    run.remove("report.html")
    capsys.readouterr()
    assert main(["report", uri]) == 0
    assert capsys.readouterr().out.strip() == run.below("report.html").place
    assert main(["report", uri, "--out", "report.html"]) == 0
    pages = run.read("report.html").decode(), Path("report.html").read_text()
    assert all("</html>" in page and "s3://" in page for page in pages)

    for form in ("yaml", "peft", "trl", "optuna", "vllm"):
        assert main(["export", uri, "--to", form, "--out", form]) == 0, capsys.readouterr().err
    [best] = [file for file in Path("yaml").iterdir() if file.suffix == ".yaml"]
    assert load_spec(best).search.trials == 1
    adapters = [file.read_bytes() for file in Path("peft").rglob(ADAPTER_WEIGHTS)]
    assert adapters == [run.below("best/adapter").read(ADAPTER_WEIGHTS)]

    assert main(["merge", uri, "--trials", "top2", "--out", "together"]) == 0, capsys.readouterr().err
    assert Path("together/config.json").is_file()

    there = sorted(Path.cwd().iterdir())
    for command in (["results"], ["report"], ["export", "--to", "peft"], ["merge"]):
        capsys.readouterr()
        assert main([command[0], uri, *command[1:], "--out", f"s3://{BUCKET}/out"]) == 2
        assert capsys.readouterr().err.startswith("lora-search: --out: found s3://...; allowed: a path on this machine")
    assert sorted(Path.cwd().iterdir()) == there


def test_dashboard_shows_a_study_in_the_store(kept: Kept) -> None:
    pytest.importorskip("optuna_dashboard")
    command = [sys.executable, "-m", "lora_search", "dashboard", kept.store.uri("runs/whole"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        with urllib.request.urlopen(f"{process.stdout.readline().split()[0]}api/studies", timeout=30) as answer:
            assert [study["study_name"] for study in json.load(answer)["study_summaries"]] == ["whole"]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130


@pytest.mark.slow
def test_driver_that_is_killed_goes_on_from_the_store_on_another_machine(
    store: Store, tiny: Path, tmp_path: Path, undisturbed: list[Row]
) -> None:
    spec = sequential(tiny, "killed", store.uri("runs"))
    file = tmp_path / "killed.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    command = [sys.executable, "-m", "lora_search", "run", str(file), "--name", spec.name]

    def environment(machine: str) -> dict[str, str]:
        (tmp_path / machine).mkdir()
        return os.environ | {"TMPDIR": str(tmp_path / machine), "RAY_TMPDIR": "/tmp"}

    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment("first"))
    shelf = Folder(store.uri("runs/killed/tune/trial-0002"))
    wait_until(lambda: bool(shelf.names()), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stored = Folder(store.uri("runs/killed"))
    record = stored.read("trials.jsonl").splitlines(keepends=True)
    stored.write("trials.jsonl", b"".join(record[:3]))  # as if the study had been uploaded, and then no more
    assert LEASE in stored.names()

    second = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, env=environment("second"), timeout=PATIENCE
    )
    assert second.returncode == 0, second.stderr
    run = find_run(store.uri("runs/killed"))
    require_whole(run, TRIALS)
    assert compared(run_rows(run)) == undisturbed


def test_store_that_fails_for_a_while_loses_nothing(kept: Kept, undisturbed: list[Row]) -> None:
    assert kept.faults.total() > 10
    assert kept.faults.keys() == {"500", NO_ANSWER}
    run = find_run(kept.outcome.run.place)
    require_whole(run, TRIALS)
    assert kept.strikes.resumed == [(0, 4, 0)]
    assert compared(run_rows(run)) == undisturbed
