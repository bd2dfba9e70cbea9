"""Write the pages that follow from the code: docs/sweep-file.md from the schema, docs/commands.md from the parser.

python docs/generate.py           write them
python docs/generate.py --check   say whether they are up to date; exit status 1 where not
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lora_search.cli.main import _parser
from lora_search.spec import SweepSpec
from lora_search.spec.schema import Lora, guide_space

HERE = Path(__file__).resolve().parent

SWEEP_FILE = """\
# The sweep file

One YAML file describes one sweep. Everything has a default: an empty file is the demo's base and data with the search
space of the usual LoRA guide. An unknown key is an error that names the nearest known one. Any key can be laid over
from the command line: `--set search.trials=16`. `lora-search plan SWEEP.yaml` checks a file without training anything.

This page is written by `python docs/generate.py` from `lora_search/spec/schema.py`.
"""

SPACE = """\
## What can be searched

`search.space` names what is searched. A parameter that it does not name has its value from `training`, or its default
from the adapter's table below. Each is given as one of these:

| written as | draws |
| --- | --- |
| `{choice: [4, 8, 16]}` | one of the values |
| `{uniform: [0.0, 0.15]}` | a number, evenly |
| `{log_uniform: [1.0e-5, 1.0e-3]}` | a number, evenly on a log scale |
| `{int_uniform: [4, 64]}` | a whole number, evenly |
| `16` | always this |

Left out, the space is the guide's:
"""

END = "\n..."
"""How YAML ends a document of one value."""

COMMANDS = """\
# The commands

RUN is a run directory, its URI in an object store, or its name under `runs/`. `--json` and `--format json` print one
JSON document on standard output and nothing else there; progress goes to standard error. Exit status: 0 done; 1 the
sweep failed; 2 the input is wrong; 130 interrupted, and resumable.

This page is written by `python docs/generate.py` from `lora_search/cli/`.
"""


def sweep_file() -> str:
    """The page of the sweep file."""
    return "\n".join(
        [
            SWEEP_FILE,
            *sections(SweepSpec, ()),
            SPACE,
            "```yaml",
            "space:",
            *(f"  {name}: {flow(domain.plain())}" for name, domain in guide_space().items()),
            "```",
            "",
            "The parameters of the adapter, which may stand in `search.space` beside every key of `training`:",
            "",
            *table(Lora),
        ]
    )


def sections(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[str]:
    """A heading and a table a section, the nested ones after it."""
    yield f"## {'.'.join(path) or 'Top level'}"
    yield ""
    yield plain(model.__doc__)
    yield ""
    yield from table(model)
    for name, field in model.model_fields.items():
        if (section := section_of(field)) is not None:
            yield from sections(section, (*path, name))


def table(model: type[BaseModel]) -> Iterator[str]:
    """The keys of one section."""
    yield "| key | default | allowed | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is not None:
            yield f"| `{name}` | | | {first_sentence(section)} |"
        else:
            yield f"| `{name}` | {default(field)} | {allowed(field)} | {cell(field.description or '')} |"
    yield ""


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    return field.annotation if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) else None


def default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "see below"
    if field.default is None:
        return ""
    return f"`{cell(flow(field.default))}`"


def flow(value: Any) -> str:
    """A value as a line of YAML."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).partition(END)[0].strip()


def allowed(field: FieldInfo) -> str:
    """The values a key takes, and their bounds."""
    bounds = [
        f"{word} {getattr(bound, name)}"
        for bound in field.metadata
        for name, word in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
        if getattr(bound, name, None) is not None
    ]
    return cell(", ".join([kind(field.annotation), *bounds]))


def kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(argument) for argument in arguments if argument is not type(None))
    if origin is list:
        return f"a list of {kind(arguments[0])}"
    if origin is dict:
        return "a mapping"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(annotation, kind(arguments[0]) if arguments else "a value")


def commands() -> str:
    """The page of the commands."""
    parser = _parser()
    (subcommands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    lines = [
        COMMANDS,
    ]
    helps = {action.dest: action.help for action in subcommands._choices_actions}
    for name, command in subcommands.choices.items():
        command.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)
        lines += [f"## {name}", "", sentence(helps[name] or ""), "", "```", command.format_usage().strip(), "```", ""]
        lines += ["| argument | meaning |", "| --- | --- |"]
        lines += [
            f"| `{argument(action)}` | {cell((action.help or '').replace('%(default)s', str(action.default)))} |"
            for action in command._actions
            if not isinstance(action, argparse._HelpAction)
        ]
        lines.append("")
    return "\n".join(lines)


def argument(action: argparse.Action) -> str:
    shown = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices:
        shown = "|".join(action.choices)
    if not action.option_strings:
        return shown
    takes_value = action.nargs != 0
    return cell(action.option_strings[-1] + (f" {shown}" if takes_value else ""))


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def plain(text: str | None) -> str:
    return " ".join((text or "").split())


def first_sentence(model: type[BaseModel]) -> str:
    return plain(model.__doc__).partition(". ")[0].removesuffix(".")


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


PAGES = {"sweep-file.md": sweep_file, "commands.md": commands}


def main() -> int:
    stale = [name for name, page in PAGES.items() if not _is(HERE / name, page().rstrip() + "\n")]
    if "--check" in sys.argv[1:]:
        print(f"out of date: {', '.join(stale)}; run python docs/generate.py" if stale else "up to date")
        return bool(stale)
    for name in stale:
        (HERE / name).write_text(PAGES[name]().rstrip() + "\n", encoding="utf-8")
    return 0


def _is(file: Path, content: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == content


if __name__ == "__main__":
    sys.exit(main())
