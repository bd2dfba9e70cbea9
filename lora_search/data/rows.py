"""From a data set's rows to segments of text, each trained on or only read, and to its three splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_search.builtin import data_file
from lora_search.errors import InputError
from lora_search.spec import Data

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


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
    dataset = _read(data, path)
    if data.limit is not None and path == data.path:
        dataset = dataset.select(range(min(data.limit, len(dataset))))
    columns = {
        "text": [data.columns.text],
        "prompt-completion": [data.columns.prompt, data.columns.completion],
        "chat": [data.columns.messages],
    }[data.format]
    for column in columns:
        if column not in dataset.column_names:
            raise InputError(
                f"data.columns: format {data.format} reads column {column!r}, which {path} does not have; "
                f"it has {', '.join(dataset.column_names)}"
            )
    render: Callable[[Mapping[str, Any]], Row] = {
        "text": lambda row: _text(data, row),
        "prompt-completion": lambda row: _prompt_completion(data, row),
        "chat": lambda row: _chat(data, row, tokenizer),
    }[data.format]
    rows = []
    for number, row in enumerate(dataset.select_columns(columns)):
        try:
            rows.append(render(row))
        except ValueError as error:
            raise InputError(f"data.path: row {number} of {path}: {error}") from None
    return rows


def _read(data: Data, path: str) -> Dataset:
    """The data set at a path, through the `datasets` library."""
    from datasets import Dataset, DatasetDict, load_dataset
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
    file = Path(str(data_file(path.removeprefix("builtin:"))) if path.startswith("builtin:") else path)
    try:
        if file.is_file():
            if file.suffix not in READERS:
                raise InputError(f"data.path: {path} is no known kind of file; allowed: {', '.join(READERS)}")
            read = load_dataset(READERS[file.suffix], data_files=str(file), split="train")
        elif file.is_dir():
            read = load_dataset(str(file), split=data.split)
        else:
            read = load_dataset(path, data.name, split=data.split)
    except InputError:
        raise
    except Exception as error:  # datasets raises a different class for every reader and hub failure
        cause = error.__cause__ or error
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise InputError(f"data.path: cannot read {path}: {first}") from error
    if isinstance(read, DatasetDict) or not isinstance(read, Dataset):
        raise InputError(f"data.split: {path} has no single split {data.split!r}")
    return read


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
    value = row[column]
    if value is None or isinstance(value, list | dict):
        raise ValueError(f"column {column!r} must be text; found {value!r}"[:200])
    return str(value)
