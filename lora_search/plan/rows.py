"""How long a sweep's rows are: from its data, or from the sweep file where the data cannot be read here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_search.errors import InputError
from lora_search.spec import SweepSpec

ASSUMED_TARGETS = 1.0
ASSUMED_VALIDATION_ROWS = 100


@dataclass(frozen=True)
class RowFacts:
    """Lengths in tokens."""

    longest: int
    mean: float
    attended: float
    """Mean over the tokens of their row's length, which is what attention costs."""
    targets: float
    """Share of the tokens that the loss counts."""
    train_rows: int | None
    validation_tokens: int
    measured: bool
    reason: str
    """Why not measured."""
    longest_tested: int
    """As `longest`, with the test split's."""


def row_facts(spec: SweepSpec) -> RowFacts:
    """Tokenise the data and measure it.

    Raises:
        InputError: the data or the base's tokenizer is here, and is wrong.
    """
    from lora_search.data import check_rows, tokenize_data
    from lora_search.model import load_tokenizer

    try:
        tokenizer = load_tokenizer(spec.base)
    except InputError:
        if _is_here(spec.base.model) and not _lacks_tokenizer(spec.base.model):
            raise
        tokenizer = None
    try:
        if tokenizer is None:
            check_rows(spec.data)
            return _assumed(spec, f"there is no tokenizer of {spec.base.model} here")
        data = tokenize_data(spec.data, tokenizer)
    except InputError:
        if _is_here(spec.data.path):
            raise
        return _assumed(spec, f"{spec.data.path} cannot be read here")
    lengths = data.train.lengths_N.astype(float)
    return RowFacts(
        longest=int(max(lengths.max(), data.validation.lengths_N.max())),
        mean=float(lengths.mean()),
        attended=float((lengths**2).sum() / lengths.sum()),
        targets=float(data.train.trained_S.mean()),
        train_rows=len(data.train),
        validation_tokens=len(data.validation.tokens_S),
        measured=True,
        reason="",
        longest_tested=data.longest,
    )


def _is_here(place: str) -> bool:
    return place.startswith("builtin:") or Path(place).exists()


def _lacks_tokenizer(model: str) -> bool:
    """Whether a folder holds no file of a tokenizer: a plan needs its config.json alone."""
    return not model.startswith("builtin:") and not any(
        next(Path(model).glob(pattern), None) for pattern in ("*token*", "vocab*", "*.model", "spiece*")
    )


def _assumed(spec: SweepSpec, reason: str) -> RowFacts:
    length = spec.data.max_length
    return RowFacts(
        longest=length,
        mean=length,
        attended=length,
        targets=ASSUMED_TARGETS,
        train_rows=None,
        validation_tokens=ASSUMED_VALIDATION_ROWS * length,
        measured=False,
        reason=reason,
        longest_tested=length,
    )
