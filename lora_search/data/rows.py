"""From a data set's rows to segments of text, each trained on or only read, and to its three splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True)
class Splits:
    """Rendered rows. No text stands in two of them."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def read_splits(data: Data, tokenizer: PreTrainedTokenizerBase) -> Splits:
    """Read, render and split the data set.

    A row's split follows from the hash of its text alone: a duplicate never crosses from one to the other, and rows
    added later move none that were there.

    Raises:
        InputError: the data set cannot be read, lacks a column, or leaves a split without rows.
    """
    rows = _rendered(data, data.path, tokenizer)
    splits = Splits([], [], [])
    test = data.test if isinstance(data.test, float) else 0.0
    validation = data.validation if isinstance(data.validation, float) else 0.0
    for row in rows:
        place = _place(row)
        part = splits.test if place < test else splits.validation if place < test + validation else splits.train
        part.append(row)
    for part, source in ((splits.validation, data.validation), (splits.test, data.test)):
        if isinstance(source, str):
            part.extend(_rendered(data, source, tokenizer))
    for name, part in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        if not part:
            raise InputError(f"data.path: of the {len(rows)} rows of {data.path} none fell into the {name} split")
    return splits


def _place(row: Row) -> float:
    """Where in [0, 1) the hash of a row's text lies; white space at its ends does not count."""
    text = "\x00".join(segment.text.strip() for segment in row)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _rendered(data: Data, path: str, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    columns = {
        "text": [data.columns.text],
        "prompt-completion": [data.columns.prompt, data.columns.completion],
        "chat": [data.columns.messages],
    }[data.format]
    source = _read(data, path, columns)
    for column in columns:
        if column not in source.columns:
            raise InputError(
                f"data.columns: format {data.format} reads column {column!r}, which {path} does not have; "
                f"it has {', '.join(source.columns)}"
            )
    render: Callable[[Mapping[str, Any]], Row] = {
        "text": lambda row: _text(data, row),
        "prompt-completion": lambda row: _prompt_completion(data, row),
        "chat": lambda row: _chat(data, row, tokenizer),
    }[data.format]
    rows = []
    for number, row in enumerate(islice(source.rows, data.limit if path == data.path else None)):
        try:
            rows.append(_encodable(render(row)))
        except ValueError as error:
            raise InputError(f"data.path: row {number} of {path}: {error}") from None
    return rows


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
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
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
    messages = row[data.columns.messages]
    if not isinstance(messages, list) or not any(m.get("role") == "assistant" for m in messages):
        raise ValueError(f"column {data.columns.messages!r} must list messages, one at least from the assistant")
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


def _template(tokenizer: PreTrainedTokenizerBase, messages: Iterable[Any], *, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise ValueError("format chat needs a tokenizer with a chat template, and this base's has none")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
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
