"""From a data set's rows to segments of text, each trained on or only read, and to its three splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_search.builtin import data_file
from lora_search.data.source import READERS, Decimal, Source, read_source
from lora_search.errors import InputError
from lora_search.spec import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Segment:
    """A stretch of text; the loss counts the tokens of a trained one alone."""

    text: str
    trained: bool


Row = tuple[Segment, ...]

Made = TypeVar("Made")


@dataclass(frozen=True)
class Splits:
    """Rendered rows. No text stands in two of them."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    overlapping: int = 0
    """Rows of data.path, and of a validation file, left out for their text stands in a file to validate or test by."""


def read_splits(data: Data, tokenizer: PreTrainedTokenizerBase) -> Splits:
    """Read, render and split the data set.

    A row's split follows from the hash of its text alone: a duplicate never crosses from one to the other, and rows
    added later move none that were there.

    Raises:
        InputError: the data set cannot be read, lacks a column, or leaves a split without rows.
    """
    rows = _rendered(data, data.path, tokenizer)
    given = {
        key: _rendered(data, source, tokenizer)
        for key, source in (("validation", data.validation), ("test", data.test))
        if isinstance(source, str)
    }
    taken = {_key(row) for part in given.values() for row in part}
    kept = [row for row in rows if _key(row) not in taken] if taken else rows
    overlapping = len(rows) - len(kept)
    if len(given) == 2:  # what is tested by stays untouched until the end: a test row that is validated by is no test
        tested = {_key(row) for row in given["test"]}
        left = [row for row in given["validation"] if _key(row) not in tested]
        overlapping += len(given["validation"]) - len(left)
        given["validation"] = left
    splits = Splits([], given.get("validation", []), given.get("test", []), overlapping)
    test = data.test if isinstance(data.test, float) else 0.0
    validation = data.validation if isinstance(data.validation, float) else 0.0
    for row in kept:
        place = _place(row)
        part = splits.test if place < test else splits.validation if place < test + validation else splits.train
        part.append(row)
    for name, part in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        if not part:
            found = f"data.path: of the {len(rows)} rows of {data.path} none fell into the {name} split"
            raise InputError(found + f"; {overlapping} stand in a file to validate or test by" * (overlapping > 0))
    return splits


def _place(row: Row) -> float:
    """Where in [0, 1) the hash of a row's text lies."""
    return int.from_bytes(hashlib.sha256(_key(row).encode()).digest()[:8], "big") / 2**64


def _key(row: Row) -> str:
    """What makes two rows the same; white space at a text's ends does not count."""
    return "\x00".join(segment.text.strip() for segment in row)


def check_rows(data: Data) -> None:
    """What can be said of the rows without a tokenizer: each has its columns, and what they hold is of the format.

    Raises:
        InputError: as `read_splits`.
    """
    for path in (data.path, *(place for place in (data.validation, data.test) if isinstance(place, str))):
        _each(data, path, lambda row: _readable(data, row))


def _rendered(data: Data, path: str, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    render: Callable[[Mapping[str, Any]], Row] = {
        "text": lambda row: _text(data, row),
        "prompt-completion": lambda row: _prompt_completion(data, row),
        "chat": lambda row: _chat(data, row, tokenizer),
    }[data.format]
    return _each(data, path, lambda row: _encodable(render(row)))


def _each(data: Data, path: str, make: Callable[[Mapping[str, Any]], Made]) -> list[Made]:
    """What `make` makes of every row of a file, folder or hub data set."""
    columns = _columns(data)
    source = _read(data, path, columns)
    for column in columns:
        if column not in source.columns:
            raise InputError(
                f"data.columns: format {data.format} reads column {column!r}, which {path} does not have; "
                f"it has {', '.join(source.columns)}"
            )
    made = []
    for number, row in enumerate(islice(source.rows, data.limit if path == data.path else None)):
        try:
            made.append(make(row))
        except ValueError as error:
            raise InputError(f"data.path: row {number} of {path}: {error}") from None
    return made


def _columns(data: Data) -> list[str]:
    return {
        "text": [data.columns.text],
        "prompt-completion": [data.columns.prompt, data.columns.completion],
        "chat": [data.columns.messages],
    }[data.format]


def _readable(data: Data, row: Mapping[str, Any]) -> None:
    if data.format == "chat":
        _messages(row, data.columns.messages)
    else:
        for column in _columns(data):
            _string(row, column)


def _encodable(row: Row) -> Row:
    """
    Raises:
        ValueError: JSON may hold half a surrogate pair, which is no text.
    """
    for segment in row:
        segment.text.encode()
    return row


def _read(data: Data, path: str, columns: Sequence[str]) -> Source:
    """The data set at a path."""
    file = Path(str(data_file(path.removeprefix("builtin:"))) if path.startswith("builtin:") else path)
    if file.is_file() and file.suffix not in READERS:
        raise InputError(f"data.path: {path} is no known kind of file; allowed: {', '.join(READERS)}")
    try:
        return read_source(file if file.exists() else path, data.name, data.split, columns)
    except Exception as error:  # datasets raises a different class for every reader and hub failure
        cause = error.__cause__ or error
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise InputError(f"data.path: cannot read {path}: {first}") from error


def _text(data: Data, row: Mapping[str, Any]) -> Row:
    return (Segment(_string(row, data.columns.text), trained=True),)


def _prompt_completion(data: Data, row: Mapping[str, Any]) -> Row:
    prompt = data.template.replace("{prompt}", _string(row, data.columns.prompt))
    return (Segment(prompt, trained=False), Segment(_string(row, data.columns.completion), trained=True))


def _chat(data: Data, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Row:
    """What the chat template writes, the assistant's turns trained on."""
    messages = _messages(row, data.columns.messages)
    segments: list[Segment] = []
    written = ""
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = _template(tokenizer, messages[:index], add_generation_prompt=True)
        after = _template(tokenizer, messages[: index + 1], add_generation_prompt=False)
        if not (before.startswith(written) and after.startswith(before)):
            raise ValueError("the chat template rewrites earlier turns, so that no turn can be trained on alone")
        segments += [Segment(before[len(written) :], trained=False), Segment(after[len(before) :], trained=True)]
        written = after
    return tuple(segments)


def _messages(row: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    messages = row.get(column)
    if not isinstance(messages, list):
        raise ValueError(f"column {column!r} must list messages; found {messages!r}"[:200])
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {index} must be a mapping of role and content; found {message!r}"[:200])
    if not any(message.get("role") == "assistant" for message in messages):
        raise ValueError(f"column {column!r} must list messages, one at least from the assistant")
    return messages


def _template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], *, add_generation_prompt: bool) -> str:
    """What the template writes.

    Raises:
        ValueError: there is no template, or it refuses these messages. A template is a program of the base's: it says
            no by jinja2's own errors, or trips over what it does not expect, as a missing content.
    """
    if not tokenizer.chat_template:
        raise ValueError("format chat needs a tokenizer with a chat template, and this base's has none")
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the base's chat template refuses its first {len(messages)} messages: {reason}"[:300]
        ) from None
    return str(text)


def _string(row: Mapping[str, Any], column: str) -> str:
    """The text in a column; a whole number is its digits, a number in JSON is what is written there."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, Decimal):
        return value.written
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    found = "nothing" if value is None else repr(value)
    raise ValueError(f"column {column!r} must be text, or a number in JSON; found {found}"[:200])
