"""What is done once before any trial: the data is tokenised, and the space held against the base's real modules.

Runs on a host, so that the driver never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_search.errors import InputError
from lora_search.imports import import_libraries
from lora_search.placement import HostPlace
from lora_search.spec import SweepSpec
from lora_search.spec.schema import Lora
from lora_search.sweep.capacity import refuse_too_large

if TYPE_CHECKING:
    from lora_search.data import TokenizedData


@dataclass(frozen=True)
class DataSummary:
    """What the driver is told of the data and the base; the tokens stay in the object store."""

    train_rows: int
    validation_rows: int
    test_rows: int
    train_tokens: int
    truncated: int
    dropped: int
    overlapping: int
    advice: str | None
    """Of rows longer than the base was made for."""
    fingerprint: str
    base: str | None
    """The base's fingerprint."""


def prepare(spec: SweepSpec, place: HostPlace) -> tuple[DataSummary, TokenizedData]:
    """Tokenise the data, and check every target set of the space and that each trial fits, on a host at that place.

    Raises:
        InputError: the base, the data or a target set cannot be used, or a trial can never fit.
    """
    import_libraries()
    from lora_search.data import tokenize_data
    from lora_search.model import base_fingerprint, load_tokenizer, model_path, refuse_long_rows
    from lora_search.targets import module_tree, resolve, skeleton

    model = skeleton(spec.base.model, trust_remote_code=spec.base.trust_remote_code, revision=spec.base.revision)
    tree = module_tree(model)
    domain = spec.search.space.get("target_modules")
    dropout = spec.search.space.get("dropout")
    for target in domain.probes() if domain else (Lora().target_modules,):
        found = resolve(tree, target)
        if found.parameters and max(dropout.probes() if dropout else (Lora().dropout,)) > 0:
            raise InputError(
                f"search.space.dropout: target set {target!r} holds fused experts of {tree.architecture}, which PEFT "
                "adapts without dropout only; set dropout: 0"
            )
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    advice = refuse_long_rows(model, data.longest)
    refuse_too_large(spec, place, data)
    summary = DataSummary(
        len(data.train),
        len(data.validation),
        len(data.test),
        len(data.train.tokens_S),
        data.truncated,
        data.dropped,
        data.overlapping,
        advice,
        data.fingerprint,
        base_fingerprint(model_path(spec.base.model), spec.base.revision),
    )
    return summary, data


def refuse_other_material(before: Mapping[str, Any], summary: DataSummary) -> None:
    """
    Args:
        before: the provenance of the sweep that is resumed.

    Raises:
        InputError: it was started on other data, or on another base of the same name.
    """
    known = before.get("data", {})
    for key, what, found in (("fingerprint", "data", summary.fingerprint), ("base", "base", summary.base)):
        was = known.get(key)
        if was is not None and found is not None and was != found:
            raise InputError(
                f"--resume: the {what} has changed since the sweep began: found {found[:12]}, was {str(was)[:12]} "
                f"(fingerprints of the {'tokens' if what == 'data' else 'weights'})"
            )
