"""The files of cluster/ as templates: each is complete as it stands, and marks what a sweep may fill in anew.

A line that ends in `# launch: KEY` has its value replaced by KEY's; everything else of the file stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_search.errors import InputError

FOLDER = Path(__file__).parent / "templates"
"""In a checkout a link to cluster/; in a wheel its files."""

MARK = re.compile(r"^(?P<key>\s*.*?(?:: |=))(?P<value>.*?)(?P<mark>  # launch: (?P<name>\w+))$")
EDIT = re.compile(r"\bEDIT\b")
"""Stands where only the user knows what belongs there."""


@dataclass(frozen=True)
class Template:
    """A launch file to be filled in."""

    path: Path
    text: str

    def fill(self, values: Mapping[str, str | None]) -> str:
        """The file with a sweep's values; one of several lines becomes a YAML block, and None is what stands there.

        Raises:
            InputError: the file marks a line with a key that is not in `values`.
        """
        lines = self.text.splitlines()
        return "\n".join(self._line(number, line, values) for number, line in enumerate(lines, start=1)) + "\n"

    def _line(self, number: int, line: str, values: Mapping[str, str | None]) -> str:
        found = MARK.match(line)
        if found is None:
            return line
        if found["name"] not in values:
            allowed = ", ".join(values)
            raise InputError(f"{self.path}:{number}: # launch: found {found['name']!r}; allowed here: {allowed}")
        value = values[found["name"]]
        if value is None:
            return line
        if "\n" in value:
            indent = " " * (len(line) - len(line.lstrip()) + 2)
            value, block = "|", "".join(f"\n{indent}{part}" for part in value.rstrip("\n").split("\n"))
        else:
            block = ""
        return f"{found['key']}{value}{found['mark']}{block}"


def load_template(name: str | None, default: str) -> Template:
    """A file of the user's, or one of cluster/ by its name; without a name, `default` of cluster/.

    Raises:
        InputError: there is none.
    """
    for path in (FOLDER / default,) if name is None else (Path(name), FOLDER / name):
        if path.is_file():
            return Template(path, path.read_text(encoding="utf-8"))
    ours = ", ".join(sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".yaml", ".sbatch")))
    raise InputError(f"--template: found {name!r}, which is no file; allowed: a file, or one of {ours}")


def left_to_edit(text: str) -> list[tuple[int, str]]:
    """Number and text of the lines that the user has yet to complete."""
    return [
        (number, line.strip())
        for number, line in enumerate(text.splitlines(), start=1)
        if EDIT.search(line.partition("#")[0])
    ]
