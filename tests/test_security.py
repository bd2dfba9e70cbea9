"""What a sweep keeps to itself, and what it never runs."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from conftest import make_spec

from lora_search.cli import main
from lora_search.errors import InputError
from lora_search.spec import dump_spec, parse_spec

PLANTED = {
    "WANDB_API_KEY": "f00dfeed" * 5,
    "HF_TOKEN": "hf_PLANTEDplantedPLANTEDplanted123456",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED12",
    "AWS_SECRET_ACCESS_KEY": "PlAnTeDaWsSeCrEt0123456789abcdefPLANTED0",
    "AWS_SESSION_TOKEN": "PlAnTeDsEsSiOn0123456789",
}

WITHOUT_TOKEN = """
import sys
from ray._raylet import GcsClient
try:
    print("let in:", GcsClient(address=sys.argv[1]).internal_kv_keys(b"", b"", timeout=10))
except Exception as error:
    print("refused:", type(error).__name__, error)
"""


# A sweep, watched from outside


@dataclass
class Watched:
    """A sweep of the command line that has come to its end, and what was seen of its processes."""

    run: Path
    logs: Path
    """Ray's."""
    token: Path
    said: str
    status: int
    arguments: set[str] = field(default_factory=set)
    listening: set[tuple[str, str]] = field(default_factory=set)
    """Process and address."""
    stranger: str = ""
    """What a client without the token was told."""


@pytest.fixture(scope="module")
def watched(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    home = folder / "home"
    home.mkdir()
    spec = make_spec(
        tiny,
        name="watched",
        search={"trials": 2},
        hosts={"count": 1, "trials_per_host": 1},
        tracking={"wandb": {"mode": "offline"}},
        output=str(folder),
    )
    (folder / "sweep.yaml").write_text(dump_spec(spec))
    logs = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path has no more than 107 characters
    environment = os.environ | PLANTED | {"HOME": str(home), "RAY_TMPDIR": str(logs), "WANDB_MODE": "offline"}
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "lora_search", "run", str(folder / "sweep.yaml")]
    seen = Watched(folder / "watched", logs, home / ".ray" / "auth_token", "", 0)
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            look(process.pid, seen)
            if not seen.stranger and (gcs := gcs_address(seen.arguments)):
                seen.stranger = knock(gcs, environment)
            time.sleep(0.5)
    seen.said, seen.status = (folder / "said").read_text(), process.returncode
    yield seen
    shutil.rmtree(logs)


def look(pid: int, seen: Watched) -> None:
    """Note the arguments and the open ports of a process and all that it has started."""
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            seen.arguments.add("\0".join(process.cmdline()))
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    seen.listening.add((process.name(), connection.laddr.ip))
        except psutil.Error:  # it has ended meanwhile
            continue


def gcs_address(arguments: set[str]) -> str | None:
    for line in arguments:
        for argument in line.split("\0"):
            if argument.startswith("--gcs-address="):
                return argument.partition("=")[2]
    return None


def knock(address: str, environment: dict[str, str]) -> str:
    """Ask Ray for something without a token."""
    stranger = environment | {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", WITHOUT_TOKEN, address]
    return subprocess.run(command, env=stranger, capture_output=True, text=True, timeout=60).stdout


def test_sweep_with_secrets_in_its_environment_comes_to_its_end(watched: Watched) -> None:
    assert watched.status == 0, watched.said
    assert (watched.run / "best" / "README.md").is_file()
    assert list((watched.run / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("name", [*PLANTED, "Ray's token"])
def test_secret_is_in_no_file_no_log_and_no_process_arguments(watched: Watched, name: str) -> None:
    secret = PLANTED.get(name) or watched.token.read_text().strip()
    assert len(secret) >= 20
    assert secret not in watched.said
    assert not [line for line in watched.arguments if secret in line]
    files = [file for folder in (watched.run, watched.logs) for file in folder.rglob("*") if file.is_file()]
    assert len([file for file in files if watched.logs in file.parents]) > 5
    assert not [str(file) for file in files if secret.encode() in file.read_bytes()]


def test_no_process_of_a_sweep_listens_beyond_this_machine(watched: Watched) -> None:
    names = {name for name, _ in watched.listening}
    assert {"gcs_server", "raylet"} <= names
    assert any(name.startswith("ray::") for name in names)
    assert {address.removeprefix("::ffff:") for _, address in watched.listening} <= {"127.0.0.1", "::1"}


def test_ray_lets_nobody_in_without_its_token(watched: Watched) -> None:
    assert watched.stranger.startswith("refused:"), watched.stranger
    assert "token" in watched.stranger.lower() or "unauthenticated" in watched.stranger.lower()


def test_rays_new_token_is_for_its_user_alone(watched: Watched) -> None:
    assert stat.S_IMODE(watched.token.stat().st_mode) == 0o600


# Secrets in a sweep file


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("tracking:\n  wandb:\n    api_key: abc123SECRET", "sweep.yaml:3: tracking.wandb.api_key: "),
        ("hf-token: abc123SECRET", "sweep.yaml:1: hf-token: "),
        ("base: {accessToken: abc123SECRET}", "sweep.yaml:1: base.accessToken: "),
        ("secrets: {wandb: abc123SECRET}", "sweep.yaml:1: secrets: "),
        ("search: {enqueue: [{password: abc123SECRET}]}", "sweep.yaml:1: search.enqueue[0].password: "),
        ("tracking: {wandb: {entity: " + "5ec4e7" * 6 + "abcd}}", "sweep.yaml:1: tracking.wandb.entity: "),
        ("base: {model: hf_abc123SECRETabc123SECRETabc123SECR}", "sweep.yaml:1: base.model: "),
        ("name: AKIASECRET0SECRET012", "sweep.yaml:1: name: "),
        ("output: s3://AKIA:abc123SECRET@bucket/runs", "sweep.yaml:1: output: "),
        ("output: s3://bucket/runs?secret_key=abc123SECRET", "sweep.yaml:1: output: "),
        (
            "search: {space: {target_modules: [sk-proj-abc123SECRETabc123SECRET]}}",
            "sweep.yaml:1: search.space.target_m",
        ),
    ],
)
def test_secret_in_a_sweep_file_is_refused_and_not_repeated(text: str, where: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_spec(text, source="sweep.yaml", folder=Path())
    message = str(refused.value)
    assert message.startswith(where)
    assert "***" in message
    assert "WANDB_API_KEY" in message
    assert "SECRET" not in message.replace("AWS_SECRET_ACCESS_KEY", "")
    assert "5ec4e7" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "override", ["tracking.wandb.api_key=abc123SECRET", "name=hf_abc123SECRETabc123SECRET", "x.token=@abc123SECRET"]
)
def test_secret_on_the_command_line_ends_it_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    (tmp_path / "sweep.yaml").write_text("name: harmless")
    assert main(["run", str(tmp_path / "sweep.yaml"), "--set", override]) == 2
    said = capsys.readouterr().err
    assert "--set" in said
    assert override.partition("=")[0] in said
    assert "***" in said
    assert override.partition("=")[2] not in said


@pytest.mark.parametrize(
    "text",
    [
        "base: {model: gpt2, revision: " + "0a1b" * 10 + "}",  # a commit
        "base: {model: hf-internal-testing/tiny-random-gpt2}",
        "base: {model: gpt2}\noutput: /cache/snapshots/" + "0a1b" * 10,
        "output: s3://bucket/runs?endpoint_override=127.0.0.1:9000",
        "data: {path: sk-learn/data}",
        "search: {metric: token_accuracy}",
    ],
)
def test_what_is_no_secret_is_taken(text: str) -> None:
    parse_spec(text, source="sweep.yaml", folder=Path())


def test_cluster_without_token_authentication_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from lora_search.sweep.cluster import cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(ray, "init", lambda **_: None)
    said: list[str] = []
    with cluster(None, said.append):
        pass
    assert len(said) == 1
    assert said[0].startswith("WARNING: RAY_AUTH_MODE=disabled")
