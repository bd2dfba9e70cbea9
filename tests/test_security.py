"""What a sweep keeps to itself, and what it never runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from bad_wandb import bad_wandb
from conftest import make_spec
from searched_run import write_searched
from test_store import BUCKET, server  # noqa: F401  # a fixture

from lora_search.best import export_adapter
from lora_search.checkpoint import ADAPTER_WEIGHTS, REPORTS, TRIAL, Shelf, require_lora, seal
from lora_search.cli import main
from lora_search.data.rows import read_splits
from lora_search.errors import InputError, SweepError
from lora_search.export import FORMATS
from lora_search.model import load_base, load_tokenizer
from lora_search.rundir import RunDirectory, write_whole
from lora_search.search import create_study
from lora_search.spec import dump_spec, parse_spec
from lora_search.storage import Folder

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
    home: Path
    """What its user's home was."""
    said: str
    status: int
    arguments: set[str] = field(default_factory=set)
    listening: set[tuple[str, str]] = field(default_factory=set)
    """Process and address."""
    stranger: str = ""
    """What a client without the token was told."""

    @property
    def token(self) -> Path:
        """Ray's."""
        return self.home / ".ray" / "auth_token"

    def require_secret(self, secret: str) -> None:
        """That it is nowhere but in the environment."""
        assert secret not in self.said
        assert not [line for line in self.arguments if secret in line]
        files = [file for folder in (self.run, self.logs, self.home) for file in folder.rglob("*") if file.is_file()]
        assert len([file for file in files if self.logs in file.parents]) > 5
        assert (self.run / "trials.jsonl") in files
        assert not [str(file) for file in files if file != self.token and secret.encode() in file.read_bytes()]


@pytest.fixture(scope="module")
def watched(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    spec = make_spec(
        tiny,
        name="watched",
        search={"trials": 2},
        hosts={"count": 1, "trials_per_host": 1},
        tracking={"wandb": {"mode": "offline"}},
        output=str(folder),
    )
    (folder / "sweep.yaml").write_text(dump_spec(spec))
    plant_pickles(folder / "watched", folder / "ran")
    (folder / "watched" / "sweep.yaml").write_text(dump_spec(spec))
    seen = watch(folder / "sweep.yaml", folder / "watched", {"WANDB_MODE": "offline"}, "--resume")
    yield seen
    shutil.rmtree(seen.logs)


@pytest.fixture(scope="module")
def using(server: tuple[str, int], tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:  # noqa: F811
    """A sweep that shows what is in its environment: to the store that its run directory is in, and to W&B."""
    folder = tmp_path_factory.mktemp("using")
    endpoint = "{}:{}".format(*server)
    spec = make_spec(
        tiny,
        name="using",
        search={"trials": 2},
        hosts={"count": 1, "trials_per_host": 1},
        tracking={"wandb": {"mode": "online"}},
        output=f"s3://{BUCKET}/secrets?endpoint_override={endpoint}&scheme=http",
    )
    (folder / "sweep.yaml").write_text(dump_spec(spec))
    with bad_wandb("answers 500") as wandb:
        seen = watch(folder / "sweep.yaml", folder / "using", {"WANDB_BASE_URL": wandb["WANDB_BASE_URL"]})
    from pyarrow.fs import S3FileSystem, copy_files

    store = S3FileSystem(endpoint_override=endpoint, scheme="http")
    copy_files(f"{BUCKET}/secrets/using", str(seen.run), source_filesystem=store)
    yield seen
    shutil.rmtree(seen.logs)


def watch(sweep: Path, run: Path, environment: dict[str, str], *more: str) -> Watched:
    """Run a sweep with secrets in its environment, and look at its processes meanwhile."""
    home = sweep.parent / "home"
    home.mkdir()
    logs = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path has no more than 107 characters
    environment = os.environ | PLANTED | {"HOME": str(home), "RAY_TMPDIR": str(logs)} | environment
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "lora_search", "run", str(sweep), *more]
    seen = Watched(run, logs, home, "", 0)
    with (sweep.parent / "said").open("w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            look(process.pid, seen)
            if not seen.stranger and (gcs := gcs_address(seen.arguments)):
                seen.stranger = knock(gcs, environment)
            time.sleep(0.5)
    seen.said, seen.status = (sweep.parent / "said").read_text(), process.returncode
    return seen


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


def plant_pickles(run: Path, mark: Path) -> None:
    """Put pickles that make the folder `mark` wherever Ray, Tune, PEFT or transformers look for some."""
    bomb = pickle.dumps(Bomb(mark))
    state = {
        "trial_data": [["{}", bomb.hex()]],
        "runner_data": {"x": {"_type": "CLOUDPICKLE_FALLBACK", "value": bomb.hex()}},
    }
    folders = [run, run / "tune", run / "best" / "adapter", *run.glob("tune/trial-*/checkpoint_*")]
    folders += [run / "tune" / "trial-0000", run / "tune" / "trial-0000" / "checkpoint_000002"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (
            "trainable.pkl tuner.pkl error.pkl params.pkl searcher-state-2020.pkl _dict_checkpoint.pkl .metadata.pkl "
            "optimizer.pt scheduler.pt rng_state.pth training_args.bin pytorch_model.bin adapter_model.bin"
        ).split():
            (folder / name).write_bytes(bomb)
        (folder / "experiment_state-2099-01-01_00-00-00.json").write_text(json.dumps(state))


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
    watched.require_secret(secret)


@pytest.mark.parametrize("name", PLANTED)
def test_secret_that_is_used_is_in_no_file_no_log_and_no_process_arguments(using: Watched, name: str) -> None:
    assert using.status == 0, using.said
    assert "W&B failed and is left out from here on" in using.said  # it was asked
    using.require_secret(PLANTED[name])


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
        ("output: abfs://c@acc.dfs.core.windows.net/runs?sv=2024&sig=abc123SECRET%3D", "sweep.yaml:1: output: "),
        (
            "data: {path: 'https://host/rows.csv?X-Amz-Date=1&X-Amz-Signature=abc123SECRET'}",
            "sweep.yaml:1: data.path: ",
        ),
        ("data: {path: 'https://host/rows.csv?key=abc123SECRET'}", "sweep.yaml:1: data.path: "),
        ("data: {path: AIzaSECRETabc123SECRETabc123SECRETabc123}", "sweep.yaml:1: data.path: "),
        ("base: {model: glpat-abc123SECRETabc123SE}", "sweep.yaml:1: base.model: "),
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
        'data: {template: "Is it so?\\nkey={prompt}"}',
    ],
)
def test_what_is_no_secret_is_taken(text: str) -> None:
    parse_spec(text, source="sweep.yaml", folder=Path())


@pytest.mark.parametrize("more", [[], ["--json"]])
@pytest.mark.parametrize("output", ["s3://AKIA:abc123SECRET@bucket/runs", "abfs://c@acc.net/runs?sig=abc123SECRET"])
def test_secret_in_doctors_output_ends_it_with_status_2(
    capsys: pytest.CaptureFixture[str], output: str, more: list[str]
) -> None:
    assert main(["doctor", "--output", output, *more]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("lora-search: --output: found ***, which looks like ")
    assert "abc123" not in said.out + said.err


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


# Somebody else's run directory


HOSTILE = [
    {
        "event": "start",
        "trial": 7,
        "time": 1.0,
        "parameters": {"trial": "x", "target_modules": "\x1b]0;owned\x07[bold]q"},
    },
    {"event": "report", "trial": 7, "time": 1.0, "step": 2, "eval_loss": float("nan"), "host": "\x1b[2Jhost"},
    {"event": "checkpoint", "trial": 7, "time": 1.0, "step": 2, "path": "tune/trial-0007/checkpoint_000002"},
    {"event": "end", "trial": 7, "time": 1.0, "state": "failed", "reason": "a\u2028b\x1b[31m"},
    {"event": "of a later version", "trial": 7, "time": 1.0},
]


@pytest.fixture
def foreign(watched: Watched, tmp_path: Path) -> Path:
    """A copy of a sweep's run directory, with hostile pickles and lines."""
    run = tmp_path / "runs" / "watched"
    shutil.copytree(watched.run, run)
    plant_pickles(run, tmp_path / "ran")
    with (run / "trials.jsonl").open("a") as lines:
        lines.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in HOSTILE)
    return run


def test_pickles_in_a_run_directory_are_not_run_by_a_resumed_sweep(watched: Watched) -> None:
    assert (watched.run / "tune" / "tuner.pkl").is_file()
    assert not (watched.run.parent / "ran").exists()
    (watched.run.parent / "proof").mkdir()
    with pytest.raises(FileExistsError):  # they would run, if they were read
        pickle.loads(pickle.dumps(Bomb(watched.run.parent / "proof")))


def test_foreign_run_is_opened_without_running_it_or_steering_the_terminal(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.parquet"
    assert main(["status", str(foreign)]) == 0
    assert main(["status", str(foreign), "--json"]) == 0
    assert main(["results", str(foreign)]) == 0
    assert main(["results", str(foreign), "--format", "parquet", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert not [c for c in said.out + said.err if not (c.isprintable() or c == "\n")]
    assert "[bold]q" in said.out
    assert main(["results", str(foreign), "--format", "json"]) == 0
    row = json.loads(capsys.readouterr().out)[-1]
    assert (row["trial"], row["eval_loss"], row["reason"]) == (7, None, "a\u2028b\x1b[31m")
    assert row["target_modules"] == "\x1b]0;owned\x07[bold]q"
    assert main(["results", str(foreign), "--format", "csv"]) == 0
    assert main(["report", str(foreign), "--out", str(tmp_path / "report.html")]) == 0
    for form in FORMATS:
        assert main(["export", str(foreign), "--to", form, "--out", str(tmp_path / form)]) == 0
        assert any((tmp_path / form).iterdir())
    assert not (tmp_path / "ran").exists()


def test_foreign_run_is_merged_and_its_end_shown_without_running_it(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(foreign), "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    resumed = ["run", str(foreign / "sweep.yaml"), "--set", f"output={foreign.parent}", "--resume"]
    assert main([*resumed, "--set", "tracking.wandb.mode=disabled"]) == 0
    said = capsys.readouterr()
    assert "nothing is left to do" in said.err
    assert "\x1b" not in said.out + said.err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", "found [1, 2]; should be a valid dictionary"),
        ('{"event": "start", "trial": 1, "time": 1.0}', "parameters: "),
        ('{"event": "start", "trial": "../../x", "time": 1.0, "parameters": {}}', "trial: found '../../x'"),
        ('{"event": "start", "trial": -1, "time": 1.0, "parameters": {}}', "trial: found -1"),
        ('{"event": "start", "trial": 1, "time": 1.0, "parameters": {"rank": {"a": 1}}}', "parameters.rank"),
        ('{"event": "report", "trial": 0, "time": 1.0, "step": 2, "eval_loss": "0.1"}', "eval_loss: found '0.1'"),
        ('{"event": "report", "trial": 0, "time": 1.0, "step": 2, "eval_loss": 1e999}', "eval_loss: found inf"),
        ('{"event": "report", "trial": 0, "time": 1.0, "step": 1' + "0" * 5000 + "}", "not JSON: 1000"),
        ('{"event": "end", "trial": 0, "time": 1.0, "state": "\\u001b[2J", "reason": null}', "state: "),
        ('{"event": "end", "trial": 0, "time": 1.0, "state": "failed", "reason": "\\ud800"}', "not JSON: "),
        ('{"event": "checkpoint", "trial": 0, "time": 1.0, "step": 2, "path": "../../x"}', "leads out of the run"),
        ('{"event": "checkpoint", "trial": 0, "time": 1.0, "step": 2, "path": "/etc"}', "leads out of the run"),
        ("[" * 100_000, "not JSON"),
        ('{"trial": 1, "time": 1.0}', "event: "),
    ],
)
def test_line_that_is_no_event_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    (tmp_path / "sweep.yaml").write_text("name: foreign")
    start = '{"event": "start", "trial": 0, "time": 1.0, "parameters": {}}'
    (tmp_path / "trials.jsonl").write_text(f"{start}\n{line}\n{start}\n")
    for command in (["status"], ["results"], ["results", "--format", "json"]):
        assert main([command[0], str(tmp_path), *command[1:]]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"lora-search: {tmp_path}/trials.jsonl:2: ")
        assert message in said
        assert "\x1b" not in said


@pytest.mark.parametrize("line", ["[]", '{"op_code": 99}', '{"op_code": 4}', "no JSON\n{}", '{"op_code": {"a": 1}}'])
def test_journal_that_is_none_is_one_message(tiny: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "study.journal").write_text(line + "\n")
    with pytest.raises(SweepError, match=r"study\.journal: is no study"):
        create_study(make_spec(tiny), tmp_path)


@pytest.mark.parametrize("change", [{"peft_type": "PROMPT_TUNING"}, {"megatron_config": {"x": 1}}, {"peft_type": None}])
def test_adapter_that_may_import_modules_is_refused(watched: Watched, tmp_path: Path, change: dict[str, Any]) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(watched.run / "best" / "adapter", adapter)
    require_lora(adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SweepError, match="no LoRA adapter"):
        require_lora(adapter)


def test_adapter_of_pickled_weights_is_refused(watched: Watched, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(watched.run / "best" / "adapter", adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(SweepError, match=r"adapter_model\.safetensors"):
        require_lora(adapter)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (TRIAL, '{"step": 4, "sha256": {}}'),
        (TRIAL, '{"step": 4, "sha256": []}'),
        (TRIAL, '{"sha256": {"adapter_model.safetensors": "0"}}'),
        (TRIAL, '{"step": "4", "sha256": {"adapter_model.safetensors": "0"}}'),
        (TRIAL, "[1]"),
        (TRIAL, DEEP),
        (REPORTS, "[1]"),
        (REPORTS, '{"parameters": {}, "reports": [4]}'),
        (REPORTS, '{"parameters": {}, "reports": [{"step": null}]}'),
        (REPORTS, DEEP),
    ],
    ids=lambda value: value[:60],
)
def test_malformed_checkpoint_is_damaged_and_the_one_before_is_used(tmp_path: Path, name: str, content: str) -> None:
    shelf = Shelf(Folder(tmp_path), 0)
    for step in (2, 4):
        shelf.put(seal({ADAPTER_WEIGHTS: b"weights"}, {"step": step}), {"rank": 8}, [{"step": step}])
    (tmp_path / "tune" / "trial-0000" / "checkpoint_000004" / name).write_text(content)
    saved = shelf.newest()
    assert saved is not None
    assert (saved.reports, len(saved.damaged)) == ([{"step": 2}], 1)
    assert name in saved.damaged[0]
    with pytest.raises(SweepError, match=f"{name}"):
        export_adapter(RunDirectory(tmp_path), 0, tmp_path / "adapter")


def test_adapter_config_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(DEEP)
    with pytest.raises(SweepError, match=r"adapter_config\.json: is no adapter's"):
        require_lora(tmp_path)


def test_checkpoint_without_an_adapter_is_not_exported(tmp_path: Path) -> None:
    Shelf(Folder(tmp_path), 0).put(seal({ADAPTER_WEIGHTS: b"weights"}, {"step": 2}), {"rank": 8}, [{"step": 2}])
    with pytest.raises(SweepError, match=r"trial 0: the checkpoint is incomplete: it has no adapter_config\.json"):
        export_adapter(RunDirectory(tmp_path), 0, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("link", ["report.html", ".report.html.part"])
def test_report_of_a_foreign_run_writes_where_no_link_leads(tmp_path: Path, link: str) -> None:
    run, victim = write_searched(tmp_path / "run", 3), tmp_path / "victim"
    victim.write_text("mine")
    (run / link).symlink_to(victim)
    assert main(["report", str(run)]) == 0
    write_whole(run / "report.html", (run / "report.html").read_bytes())  # as a sweep does at its end
    assert victim.read_text() == "mine"
    assert not (run / "report.html").is_symlink()
    assert "</html>" in (run / "report.html").read_text()


# A base that brings code or pickles


@pytest.fixture
def base_with_code(tiny: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(tiny / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Config: pass\n")
    return folder


def test_code_of_a_base_is_not_run_unless_asked_for(
    base_with_code: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(tiny, base={"model": str(base_with_code)})
    (tmp_path / "sweep.yaml").write_text(dump_spec(spec))
    for command in (["targets", str(base_with_code)], ["plan", str(tmp_path / "sweep.yaml")]):
        assert main(command) == 2
        assert "base.trust_remote_code: true" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"base\.trust_remote_code: true"):
        load_base(spec.base, "cpu")
    assert not (tmp_path / "ran").exists()
    with suppress(Exception):  # it would run; what comes of it is no matter
        load_base(spec.base.model_copy(update={"trust_remote_code": True}), "cpu")
    assert (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_is_not_run_unless_asked_for(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny / "model", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Unheard", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    try:
        load_tokenizer(make_spec(tiny, base={"model": str(folder)}).base)
    except InputError as error:
        assert "base.trust_remote_code: true" in str(error)  # noqa: PT017 - transformers may have a class of its own
    assert not (tmp_path / "ran").exists()


def test_run_directory_may_not_ask_for_a_bases_code(
    base_with_code: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(tiny, base={"model": str(base_with_code), "trust_remote_code": True})
    (tmp_path / "sweep.yaml").write_text(dump_spec(spec))
    assert main(["merge", str(tmp_path), "--out", str(tmp_path / "merged")]) == 2
    assert "--trust-remote-code allows it" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_base_of_pickled_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny / "model", folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(InputError, match="safetensors"):
        load_base(make_spec(tiny, base={"model": str(folder)}).base, "cpu")
    assert not (tmp_path / "ran").exists()


def test_pickled_data_set_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for path in (tmp_path / "data.pkl", tmp_path):
        spec = make_spec(tiny, data={"path": str(path)})
        with pytest.raises(InputError, match=r"data\.path"):
            read_splits(spec.data, load_tokenizer(spec.base))
    assert not (tmp_path / "ran").exists()
