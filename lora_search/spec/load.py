"""From a sweep file to a checked `SweepSpec`, or to one message that says what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lora_search.errors import InputError
from lora_search.spec.paths import resolve_base, resolve_paths
from lora_search.spec.schema import SweepSpec, plain_reason, unknown_key
from lora_search.spec.secret import find_secrets, masked
from lora_search.spec.yaml import read_yaml

Path_ = tuple[str | int, ...]
"""The keys that lead to a value."""

Lines = dict[Path_, int]
"""The line of each key; 0 for one from the command line."""

UNION_MEMBERS = ("float", "str", "int", "list[str]", "literal['auto']")
"""What pydantic adds to a key's path to say which member of a union it means."""


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> SweepSpec:
    """The checked sweep of a file, local paths made absolute.

    Args:
        path: the sweep file.
        overrides: `key.path=value`, the value in YAML, laid over the file.

    Raises:
        InputError: the file cannot be read, or something in it is wrong; the message is complete.
    """
    return parse_spec(_text(path), source=str(path), folder=Path(path).parent, overrides=overrides)


def recorded_spec(path: str | Path, *, needs_base: bool = False) -> SweepSpec:
    """The sweep of a run directory, as it was resolved: its data and its base may no longer be there, or elsewhere.

    Args:
        needs_base: whether the base must be there, if it is a local folder.

    Raises:
        InputError: as `load_spec`.
    """
    spec, lines = _checked(_text(path), str(path))
    return _resolved(spec, resolve_base, Path(path).parent, str(path), lines) if needs_base else spec


def parse_spec(text: str, *, source: str, folder: Path, overrides: Sequence[str] = ()) -> SweepSpec:
    """As `load_spec`, for a text that came from `source`; relative paths are looked up in `folder` too."""
    spec, lines = _checked(text, source, overrides)
    return _resolved(spec, resolve_paths, folder, source, lines)


def dump_spec(spec: SweepSpec) -> str:
    """The sweep as YAML that `parse_spec` reads back to an equal sweep, every key written out."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such sweep file (looked in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _checked(text: str, source: str, overrides: Sequence[str] = ()) -> tuple[SweepSpec, Lines]:
    """The sweep, paths as they stand."""
    raw, lines = _parse_yaml(text, source)
    _refuse_secrets(raw, source, lines)
    for override in overrides:
        _lay_over(raw, lines, override)
        _refuse_secrets(raw, source, lines)
    try:
        return SweepSpec.model_validate(raw), lines
    except ValidationError as error:
        raise InputError("\n".join(_explain(error, source, lines))) from None


def _resolved(
    spec: SweepSpec, resolve: Callable[[SweepSpec, Path], SweepSpec], folder: Path, source: str, lines: Lines
) -> SweepSpec:
    try:
        return resolve(spec, folder)
    except ValueError as error:
        raise InputError(_located(str(error), (), source, lines)) from None


def _parse_yaml(text: str, source: str) -> tuple[dict[str, Any], Lines]:
    lines: Lines = {}
    try:
        raw = read_yaml(text, source, lambda node: _index(node, (), lines, source), empty={})
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}: not valid YAML: {reason}") from None
    except (ValueError, OverflowError) as error:  # a date that is none, a number too long
        raise InputError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{source}: a sweep file is a mapping of keys; found {type(raw).__name__}")
    return raw, lines


def _index(node: yaml.Node, path: Path_, lines: Lines, source: str) -> None:
    """Note the line of every key below `node`, and refuse a key that stands twice."""
    lines[path] = min(node.start_mark.line + 1, lines.get(path, 10**9))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*path, str(key.value))
            if below in lines:
                line = key.start_mark.line + 1
                raise InputError(f"{source}:{line}: {_dotted(below)}: stands twice; first in line {lines[below]}")
            lines[below] = key.start_mark.line + 1
            _index(value, below, lines, source)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _index(value, (*path, index), lines, source)


def _refuse_secrets(raw: dict[str, Any], source: str, lines: Lines) -> None:
    found = [_located(why, path, source, lines) for path, why in find_secrets(raw)]
    if found:
        raise InputError("\n".join(found))


def _lay_over(raw: dict[str, Any], lines: Lines, override: str) -> None:
    dotted, equals, text = override.partition("=")
    shown = masked(override)
    keys = tuple(dotted.strip().split("."))
    if not equals or not all(keys):
        raise InputError(f"--set {shown}: must be key.path=value, as in --set training.steps=60")
    try:
        value = read_yaml(text, f"--set {shown[:80]}")
    except yaml.YAMLError as error:
        raise InputError(f"--set {shown}: the value is not valid YAML: {getattr(error, 'problem', error)}") from None
    except (ValueError, OverflowError) as error:  # as in a file: a date that is none, a number too long
        raise InputError(f"--set {shown[:80]}: the value is not valid YAML: {error}") from None
    place = raw
    for depth, key in enumerate(keys[:-1], start=1):
        below = place.setdefault(key, {})
        if not isinstance(below, dict):
            raise InputError(f"--set {shown}: {_dotted(keys[:depth])} is {below!r}, which has no keys")
        place = below
    place[keys[-1]] = value
    for known in [path for path in lines if path[: len(keys)] == keys]:
        del lines[known]
    lines[keys] = 0  # line 0: the command line


def _explain(error: ValidationError, source: str, lines: Lines) -> list[str]:
    """A line for each mistake; pydantic says one for each member of a union, which is one mistake all the same."""
    mistakes: dict[Path_, list[ErrorDetails]] = {}
    for detail in error.errors():
        path = tuple(part for part in detail["loc"] if part not in UNION_MEMBERS)
        mistakes.setdefault(path, []).append(detail)
    return [_located(_message(path, details), path, source, lines) for path, details in mistakes.items()]


def _message(path: Path_, details: Sequence[ErrorDetails]) -> str:
    first = details[0]
    if first["type"] == "extra_forbidden":
        return unknown_key(str(path[-1]), _known_keys(path[:-1]))
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    reasons = dict.fromkeys(plain_reason(detail["msg"]) for detail in details)
    return f"found {_short(first['input'])}; {', or '.join(reasons)}"


def _located(message: str, path: Path_, source: str, lines: Lines) -> str:
    """Put file, line and key before a message; a message may itself begin with the rest of the key."""
    rest = re.match(r"([A-Za-z_][\w.\[\]]*): ", message)
    if rest:
        path = (*path, *(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", rest[1])))
        message = message[rest.end() :]
    known = path
    while known and known not in lines:
        known = known[:-1]
    line = lines.get(known)
    where = source if line is None or not known else "--set" if line == 0 else f"{source}:{line}"
    return f"{where}: {_dotted(path)}: {message}" if path else f"{where}: {message}"


def _known_keys(path: tuple[str | int, ...]) -> Iterable[str]:
    """The keys that the schema knows at `path`."""
    section: type[BaseModel] = SweepSpec
    for key in path:
        below = section.model_fields[str(key)].annotation
        if not (isinstance(below, type) and issubclass(below, BaseModel)):
            return ()
        section = below
    return section.model_fields


def _dotted(path: Sequence[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _short(value: Any) -> str:
    text = f"a mapping of {', '.join(map(str, value))}" if isinstance(value, Mapping) and value else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
