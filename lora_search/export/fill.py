"""Templates of exported files: text with places for values and for parts.

`{{name}}` becomes a value, written so that the file's language reads exactly it: a run directory may be somebody
else's, and no text in it may become code. `{{> name}}` becomes a part: a template of that name, whose places are filled
too, or text made by us, whose are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "templates"

PLACE = re.compile(r"^\{\{> (?P<part>\w+)\}\}\n|\{\{(?P<value>\w+)\}\}", re.MULTILINE)


def fill(template: str, values: Mapping[str, Any], parts: Mapping[str, str] | None = None) -> str:
    """A template of `templates/` by its file name, complete.

    Args:
        parts: text made by us, by its name; it goes in as it is, for there are values in it.

    Raises:
        KeyError: the template has a place that is not in `values`.
    """
    write = python if template.endswith(".py.txt") else plain_yaml
    made = parts or {}

    def filled(file: str) -> str:
        return PLACE.sub(put, _read(file))  # in one pass: what has gone in may hold braces of its own

    def put(place: re.Match[str]) -> str:
        part = place["part"]
        if part is None:
            return write(values[place["value"]])
        return made[part] if part in made else filled(f"{part}.py.txt")

    return filled(template)


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def python(value: Any) -> str:
    """A literal: a long list has a line for each value."""
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)  # reads as Python, with the quotes that Python code is wont to use
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if not isinstance(value, list):
        return repr(value)
    inside = [python(one) for one in value]
    line = f"[{', '.join(inside)}]"
    return line if len(line) <= 96 else "[\n" + "".join(f"        {one},\n" for one in inside) + "    ]"


def plain_yaml(value: Any) -> str:
    """A value of YAML in one line."""
    text = _one_line(value)
    return text if "\n" not in text else _one_line(value, default_style='"')


def _one_line(value: Any, default_style: str | None = None) -> str:
    text = str(yaml.safe_dump(value, default_flow_style=True, width=10**9, default_style=default_style))
    return text.removesuffix("\n").removesuffix("...").rstrip("\n")
