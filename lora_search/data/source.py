"""A data set's rows as they were written: JSON and CSV are read here, for `datasets` guesses a type for each column.

Its guesses rewrite text: `001` in a CSV becomes 1, `None` a missing value, "2024-05-01" in JSON a point in time.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetBuilder

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""What reads a file, by its ending."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Source:
    """The rows of one data set, and the names of all its columns."""

    columns: list[str]
    rows: Rows


class Decimal(float):
    """A JSON number with a fraction or an exponent, and how it is written: 1.50 is not 1.5 to who trains on text."""

    def __new__(cls, written: str) -> Decimal:
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str


def read_source(place: Path | str, name: str | None, split: str, wanted: Sequence[str]) -> Source:
    """Read a file, a folder, or a hub data set.

    Args:
        place: a path that is there, or a hub id.
        name: configuration of a hub data set.
        split: of a folder or hub data set; a file is one split.
        wanted: columns; of Parquet, rows have no others, for an image is decoded wherever it is looked at.

    Raises:
        ValueError: the files hold no such split, or are no JSON or CSV.
        Exception: whatever `datasets` raises, of a different class for every reader and hub failure.
    """
    if isinstance(place, Path) and READERS.get(place.suffix) == "json" and _is_json(place):
        return _source(list(_json(place)))
    from datasets import Dataset, disable_progress_bars, load_dataset_builder
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    disable_progress_bars()
    if isinstance(place, Path) and place.is_file():
        builder, split = load_dataset_builder(READERS[place.suffix], data_files=str(place)), "train"
    elif isinstance(place, Path) and (place / "state.json").is_file():
        raise ValueError("it was written by save_to_disk; write it as Parquet instead")
    else:
        builder = load_dataset_builder(str(place), name)
    if isinstance(builder, Csv):
        return _of_files(builder, split, lambda file: _csv(file, builder.config.pd_read_csv_kwargs))
    if isinstance(builder, Json) and builder.config.field is None:
        return _of_files(builder, split, _json)
    builder.download_and_prepare()
    read = builder.as_dataset(split=split)
    if not isinstance(read, Dataset):
        raise ValueError(f"it has no single split {split!r}")
    return Source(list(read.column_names), read.select_columns([name for name in wanted if name in read.column_names]))


def _of_files(builder: DatasetBuilder, split: str, read: Any) -> Source:
    """The rows of `split`, which may be a slice or a sum of splits, as `datasets` writes them."""
    from datasets import DownloadManager, ReadInstruction

    manager = DownloadManager(dataset_name=builder.dataset_name)
    named = [known for known in builder.config.data_files if re.search(rf"(?<!\w){re.escape(str(known))}(?!\w)", split)]
    splits: dict[str, list[Mapping[str, Any]]] = {}
    for known in named:
        # By its own address, which may be in the hub's cache: an archive comes out as a folder of files.
        files = manager.iter_files(manager.download_and_extract(list(builder.config.data_files[known])))
        splits[str(known)] = list(chain.from_iterable(read(Path(file)) for file in files))
    if not splits:
        raise ValueError(f"it has no split {split!r}; it has {', '.join(map(str, builder.config.data_files))}")
    lengths = {known: len(rows) for known, rows in splits.items()}
    parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    return _source([row for part in parts for row in splits[part.splitname][part.from_ : part.to]])


def _source(rows: Sequence[Mapping[str, Any]]) -> Source:
    if not rows:
        raise ValueError("it holds no rows")
    return Source(list(dict.fromkeys(key for row in rows for key in row)), rows)


def _is_json(place: Path) -> bool:
    """Whether a file begins as JSON, which no archive does: it is read without `datasets`, slow to import."""
    if not place.is_file():
        return False
    with place.open("rb") as file:
        return file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"[")


def _csv(file: Path, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every cell as text; None for a cell that its line is too short to have."""
    import pandas as pd

    frame = pd.read_csv(file, **{**options, "dtype": object, "keep_default_na": False, "chunksize": None})
    if not isinstance(frame.index, pd.RangeIndex):  # pandas makes row names of what stands before the header's columns
        raise ValueError(f"its rows have more cells than its header, {', '.join(map(str, frame.columns))}")
    names = [str(column) for column in frame.columns]
    for cells in frame.itertuples(index=False, name=None):
        yield {name: cell if isinstance(cell, str) else None for name, cell in zip(names, cells, strict=True)}


def _json(file: Path) -> Iterator[dict[str, Any]]:
    """One object a line, or one list of objects or of texts."""
    content = file.read_text(encoding="utf-8-sig")
    if content.lstrip().startswith("["):
        for number, row in enumerate(_parsed(content)):
            yield _object(row if not isinstance(row, str) else {"text": row}, f"item {number}")
        return
    lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    for number, line in lines:
        try:
            row = _parsed(line)
        except ValueError as error:
            if number == lines[0][0] and len(lines) > 1:  # one object over several lines, then, or none at all
                try:
                    yield _object(_parsed(content), "the file")
                    return
                except ValueError:
                    pass
            raise ValueError(f"line {number}: no JSON: {error}") from None
        yield _object(row, f"line {number}")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_float=Decimal, parse_constant=lambda word: None)  # NaN, as pandas writes it
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {json.dumps(row)[:60]}; a row is an object of columns")
    return row
