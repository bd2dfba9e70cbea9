"""Write a launch file, and run the command that submits it."""

from __future__ import annotations

import shutil
import subprocess

from lora_search.errors import InputError, SweepError
from lora_search.launch.compose import Launch


def write(launch: Launch) -> None:
    """Write the launch file; one that is there already and differs, edited perhaps, is left alone.

    Raises:
        InputError: it cannot be written.
    """
    try:
        if launch.out.exists() and launch.out.read_text(encoding="utf-8") != launch.text:
            raise InputError(f"--out: {launch.out} is there already and differs; allowed: a new file, or remove it")
        launch.out.write_text(launch.text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--out: {launch.out} cannot be written: {error}") from None


def submit(launch: Launch) -> None:
    """Run the launch's command.

    Raises:
        InputError: the file is not complete yet, or a program is not installed.
        SweepError: the command failed.
    """
    if launch.edits:
        number, line = launch.edits[0]
        raise InputError(f"--submit: {launch.out}:{number}: found {line!r}; put in what belongs there for EDIT first")
    missing = [tool for tool in launch.tools if shutil.which(tool) is None]
    if missing:
        raise InputError(f"--submit: {missing[0]} is not installed here; {launch.out} is written, to submit elsewhere")
    status = subprocess.run(["bash", "-c", launch.command], check=False).returncode
    if status:
        raise SweepError(f"--submit: exit status {status} of: {launch.command}")
