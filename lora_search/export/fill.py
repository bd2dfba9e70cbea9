"""Templates of exported files: text with places for values and for parts.

`{{name}}` becomes a value, written so that the file's language reads exactly it: a run directory may be somebody
else's, and no text in it may become code. `{{> name}}` becomes a part: a template of that name, or text made by us.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "templates"

PART = re.compile(r"^\{\{> (\w+)\}\}\n", re.MULTILINE)
VALUE = re.compile(r"\{\{(\w+)\}\}")


def fill(template: str, values: Mapping[str, Any], parts: Mapping[str, str] | None = None) -> str:
    """A template of `templates/` by its file name, complete.

    Raises:
        KeyError: the template has a place that is not in `values`.
    """
    write = python if template.endswith(".py.txt") else plain_yaml
    text = _part("", {**(parts or {}), "": _read(template)})
    return VALUE.sub(lambda found: write(values[found[1]]), text)


def _part(name: str, parts: Mapping[str, str]) -> str:
    """A part, with the parts in it."""
    text = parts[name] if name in parts else _read(f"{name}.py.txt")
    return PART.sub(lambda found: _part(found[1], parts), text)


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def python(value: Any) -> str:
    """A literal: a long list has a line for each value."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # reads as Python, with the quotes that Python code is wont to use
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
