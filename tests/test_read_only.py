"""An output folder that may only be read, before a sweep begins or all at once in the middle of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from conftest import PATIENCE, make_spec, wait_until
from test_faults import SEQUENTIAL, TRIALS, compared, require_whole

from lora_search.cli.main import main
from lora_search.journal import open_study
from lora_search.results import run_rows
from lora_search.rundir import RunDirectory

if TYPE_CHECKING:
    from lora_search.spec import SweepSpec


class Output:
    """A folder that can be made read-only, for root too where it is root that runs the tests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mounted = False

    def lock(self) -> None:
        """All but what is open already: a mount of the folder over itself."""
        if os.geteuid() != 0:  # the rights of a folder do not bind root
            for folder in [self.path, *(path for path in self.path.rglob("*") if path.is_dir())]:
                folder.chmod(0o500)
            return
        view = self.path.with_name("view")  # first, since nobody writes there: the folder itself would be busy
        view.mkdir()
        if subprocess.run(["mount", "--bind", str(self.path), str(view)], capture_output=True).returncode != 0:
            pytest.skip("needs the right to mount a folder read-only")
        subprocess.run(["mount", "-o", "remount,bind,ro", str(view)], check=True)
        subprocess.run(["mount", "--bind", str(view), str(self.path)], check=True)
        self._mounted = True

    def unlock(self) -> None:
        if self._mounted:
            for folder in (self.path, self.path.with_name("view")):
                subprocess.run(["umount", "--lazy", str(folder)], check=True)
            self._mounted = False
        elif os.geteuid() != 0:
            for folder in [self.path, *(path for path in self.path.rglob("*") if path.is_dir())]:
                folder.chmod(0o700)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Output]:
    output = Output(tmp_path / "output")
    yield output
    output.unlock()


def sweep(tiny: Path, output: Output, tmp_path: Path) -> tuple[SweepSpec, list[str]]:
    spec = make_spec(
        tiny,
        name="read-only",
        hosts=SEQUENTIAL,
        search={"trials": TRIALS},
        training={"steps": 40, "eval_every": 2},
        output=str(output.path),
    )
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    return spec, ["run", str(file), "--name", spec.name]


def test_output_that_is_read_only_is_one_message_before_ray_starts(
    tiny: Path, output: Output, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, command = sweep(tiny, output, tmp_path)
    output.lock()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "output: cannot make a run directory in" in said
    assert "Read-only file system" in said or "Permission denied" in said
    assert main(["doctor", "--output", str(output.path)]) == 1
    said = " ".join(capsys.readouterr().out.split())  # lines are broken where the terminal ends
    assert "ead-only file system" in said or "Permission denied" in said


@pytest.mark.slow
def test_output_that_becomes_read_only_ends_the_sweep_and_it_goes_on_later(
    tiny: Path, output: Output, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, command = sweep(tiny, output, tmp_path)
    run = RunDirectory(output.path / spec.name)
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_search", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    saved = '"event": "checkpoint", "trial": 1'
    wait_until(lambda: run.trials.exists() and saved in run.trials.read_text(), process)
    output.lock()
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    (message,) = [line for line in said.splitlines() if "cannot be written to" in line]
    assert "Read-only file system" in message or "Permission denied" in message
    assert message.endswith("mend it, then --resume")

    capsys.readouterr()
    assert main(["status", str(run.path)]) == 0  # what there is can be read
    assert "read-only: interrupted" in capsys.readouterr().out
    assert main([*command, "--resume"]) == 1
    said = capsys.readouterr().err
    assert "cannot be written to" in said
    assert "Traceback" not in said

    output.unlock()
    assert len(open_study(run.path).trials) >= 2
    second = subprocess.run(
        [sys.executable, "-m", "lora_search", *command, "--resume"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert second.returncode == 0, second.stderr
    require_whole(run, TRIALS)
    undisturbed = subprocess.run(
        [sys.executable, "-m", "lora_search", *command, "--name", "whole"], capture_output=True, timeout=PATIENCE
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert compared(run_rows(run)) == compared(run_rows(RunDirectory(output.path / "whole")))
