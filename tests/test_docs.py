"""The documentation: pages that follow from the code are up to date, links lead somewhere, commands run."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_search.cli.main import _parser, main
from lora_search.results import run_rows
from lora_search.rundir import RunDirectory
from lora_search.spec import load_spec

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("kept_verifier")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *ROOT.glob("cluster/*.md"),
]


def test_generated_pages_are_up_to_date() -> None:
    found = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert found.stdout == "up to date\n", found.stdout + found.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


PLATFORMS = (
    "A cluster that is there: `ray job submit`",
    "Slurm",
    "Kubernetes",
    "AWS and Google Cloud",
    "Machines of your own",
    "SkyPilot",
    "The image",
)
PARTS = ["Edit", "Run", "Secrets", "Cost", "Stop"]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform_says_what_to_edit_how_to_run_what_it_costs_and_how_to_stop(platform: str) -> None:
    page = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    sections = dict(section.split("\n", 1) for section in page.split("\n## ")[1:])
    assert re.findall(r"^- \*\*(\w+)\*\*: \S", sections[platform], re.MULTILINE) == PARTS


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    source = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "lora_search").rglob("*.py")))
    said = re.sub(r'"\s*f?"', "", source)  # literals that stand side by side are one
    said = re.sub(r"\{[^{}]*\}", "...", said)
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    phrases = [phrase for row in rows for phrase in re.findall(r"`([^`]{12,})`", row)]
    assert len(phrases) > 8
    pieces = {phrase: [piece for piece in re.split(r"\.\.\.", phrase) if len(piece) > 8] for phrase in phrases}
    assert not [phrase for phrase, wanted in pieces.items() if not all(piece in said for piece in wanted)]


# Commands

PLACEHOLDERS = {"SWEEP.yaml": "sweeps/demo.yaml", "RUN": "demo"}

ELSEWHERE = {
    "--address": "tests/test_cluster.py",
    "--resume": "tests/test_faults.py",
    "s3://": "tests/test_store.py",
    "--template my-": "tests/test_launch.py",
    "slurm|": "a list of options, no command",
    "--set output=": "tests/test_launch.py",
    "lora-search serve": "tests/test_serve.py",
}
"""What a command holds that is run by other tests."""


def shown_commands(page: Path) -> Iterator[str]:
    """Commands of ours in a page: indented, fenced, or in the running text."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^ {4,}(lora-search .*)$|`(lora-search [^`]*)`", text, re.MULTILINE)
    for indented, inline in found:
        command = " ".join((indented.partition("  #")[0] or inline).split())
        if len(shlex.split(command)) > 2 or command == "lora-search doctor":
            yield shlex.join(PLACEHOLDERS.get(word, word) for word in shlex.split(command))


COMMANDS = sorted({command for page in PAGES for command in shown_commands(page)})


@pytest.fixture(scope="module")
def world(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder, where commands may write."""
    return shutil.copytree(demo_folder, tmp_path_factory.mktemp("world") / "world")


def test_driver_never_imports_torch(world: Path) -> None:
    """Torch and its libraries take five seconds and 400 MB: whatever comes back from a host is plain."""
    modules = (world / "modules").read_text(encoding="utf-8").split()
    assert "ray" in modules
    assert "torch" not in modules


def test_driver_takes_no_handler_of_rays_that_cannot_be_caught(world: Path) -> None:
    """That of absl ends the process at a SIGTERM that comes while Ray starts; it alone looks after SIGTRAP."""
    caught = int((world / "caught").read_text(encoding="utf-8"), 16)
    assert caught >> signal.SIGINT - 1 & 1
    assert not caught >> signal.SIGTRAP - 1 & 1


def test_memory_of_each_trial_is_told(world: Path) -> None:
    assert all(row["trial_memory_bytes"] > 0 for row in run_rows(RunDirectory(world / "runs" / "demo")))


def test_pages_show_commands() -> None:
    assert len(COMMANDS) > 12


@pytest.mark.parametrize("command", COMMANDS)
def test_shown_command_runs(
    command: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, test in ELSEWHERE.items():
        if part in command:
            pytest.skip(f"{part}: {test}")
    monkeypatch.chdir(world)
    words = shlex.split(command)[1:]
    if words[0] == "run":  # the world's run is one; here, that the sweep would begin
        arguments = _parser().parse_args(words)
        load_spec(Path(arguments.sweep), arguments.set)
        return
    assert main(words) == 0, capsys.readouterr().err
