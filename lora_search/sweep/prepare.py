"""What is done once before any trial: the data is tokenised, and the space held against the base's real modules.

Runs in a worker of its own, so that the driver never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_search.spec import SweepSpec

if TYPE_CHECKING:
    from lora_search.data import TokenizedData


@dataclass(frozen=True)
class DataSummary:
    """What the driver is told of the data; the tokens stay in the object store."""

    train_rows: int
    validation_rows: int
    test_rows: int
    train_tokens: int
    truncated: int
    dropped: int
    fingerprint: str


def prepare(spec: SweepSpec) -> tuple[DataSummary, TokenizedData]:
    """Tokenise the data and check every target set of the space.

    Raises:
        InputError: the base, the data or a target set cannot be used.
    """
    from lora_search.data import tokenize_data
    from lora_search.model import load_tokenizer
    from lora_search.targets import resolve, skeleton

    model = skeleton(spec.base.model, trust_remote_code=spec.base.trust_remote_code, revision=spec.base.revision)
    domain = spec.search.space.get("target_modules")
    for target in domain.probes() if domain else ("all-linear",):
        resolve(model, target)
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    summary = DataSummary(
        len(data.train),
        len(data.validation),
        len(data.test),
        len(data.train.tokens_S),
        data.truncated,
        data.dropped,
        data.fingerprint,
    )
    return summary, data
