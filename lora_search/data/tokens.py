"""Token sequences, made once a sweep and shared by all hosts as flat arrays.

Legend: N rows of a split, S tokens of all its rows together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lora_search.data.rows import Row, read_splits
from lora_search.errors import InputError
from lora_search.spec import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenSplit:
    """Rows of tokens without padding; row i is `tokens_S[offsets[i]:offsets[i + 1]]`."""

    tokens_S: npt.NDArray[np.int32]
    trained_S: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths_N(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    def row(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """The tokens of a row, and which of them the loss counts."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.tokens_S[start:end], self.trained_S[start:end]


@dataclass(frozen=True)
class TokenizedData:
    """The three splits of a data set, in tokens of one tokenizer."""

    train: TokenSplit
    validation: TokenSplit
    test: TokenSplit
    pad_token_id: int
    fingerprint: str
    """SHA-256 over all tokens and masks: equal exactly where training would be."""
    truncated: int
    """Rows cut at max_length."""
    dropped: int
    """Rows of which max_length left nothing to train on."""
    overlapping: int = 0
    """Rows left out for their text stands in a file that is validated or tested by."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row of all splits."""
        return max(int(split.lengths_N.max()) for split in (self.train, self.validation, self.test))


def tokenize_data(data: Data, tokenizer: PreTrainedTokenizerBase) -> TokenizedData:
    """Read, split and tokenise a data set. Deterministic: the same file, template and tokenizer, the same tokens.

    Raises:
        InputError: the data set cannot be used; the message says why.
    """
    splits = read_splits(data, tokenizer)
    tokenizer_ends = data.format == "chat"  # a chat template writes its own first and end tokens
    counts = {"truncated": 0, "dropped": 0}
    train, validation, test = (
        _tokenize(rows, tokenizer, data.max_length, tokenizer_ends, counts)
        for rows in (splits.train, splits.validation, splits.test)
    )
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        if not len(split):
            raise InputError(
                f"data.max_length: {data.max_length} tokens leave no row of the {name} split anything to train on"
            )
    digest = hashlib.sha256()
    for split in (train, validation, test):
        for array in (split.tokens_S, split.trained_S, split.offsets):
            digest.update(np.ascontiguousarray(array).tobytes())
    return TokenizedData(
        train,
        validation,
        test,
        int(tokenizer.pad_token_id),
        digest.hexdigest(),
        counts["truncated"],
        counts["dropped"],
        splits.overlapping,
    )


def _tokenize(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    tokenizer_ends: bool,
    counts: dict[str, int],
) -> TokenSplit:
    rows = list(rows)
    texts = [segment.text for row in rows for segment in row]
    pieces = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    first = [] if tokenizer_ends else leading_tokens(tokenizer)
    last = [] if tokenizer_ends else [int(tokenizer.eos_token_id)]
    tokens: list[int] = []
    trained: list[bool] = []
    offsets = [0]
    for row in rows:
        ids, mask = list(first), [False] * len(first)
        for segment in row:
            piece = next(pieces)
            ids += piece
            mask += [segment.trained] * len(piece)
        ids, mask = ids + last, mask + [True] * len(last)
        counts["truncated"] += len(ids) > max_length
        ids, mask = ids[:max_length], mask[:max_length]
        if not any(mask[1:]):  # the first token is predicted from nothing
            counts["dropped"] += 1
            continue
        tokens += ids
        trained += mask
        offsets.append(len(tokens))
    return TokenSplit(np.array(tokens, np.int32), np.array(trained, np.bool_), np.array(offsets, np.int64))


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text (a start token, or nothing)."""
    ids = list(tokenizer("")["input_ids"])
    ends = list(tokenizer("a")["input_ids"])[-1:] == [tokenizer.eos_token_id]
    return ids[:-1] if ends and ids[-1:] == [tokenizer.eos_token_id] else ids
