"""What is done once before any trial: the data is tokenised, and the space held against the base's real modules.

Runs on a host, so that the driver never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_search.errors import InputError
from lora_search.imports import import_libraries
from lora_search.placement import HostPlace
from lora_search.positions import refuse_long_rows
from lora_search.spec import SweepSpec
from lora_search.spec.schema import Lora
from lora_search.sweep.answers import NodeUnfit
from lora_search.sweep.capacity import refuse_too_large

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
    overlapping: int
    advice: str | None
    """Of rows longer than the base was made for."""
    fingerprint: str


def prepare(spec: SweepSpec, place: HostPlace) -> tuple[DataSummary, TokenizedData]:
    """Tokenise the data, and check every target set of the space and that each trial fits, on a host at that place.

    Raises:
        InputError: the base, the data or a target set cannot be used, or a trial can never fit.
    """
    import_libraries()
    from lora_search.data import tokenize_data
    from lora_search.engine.trouble import device_fails_host
    from lora_search.model import load_tokenizer
    from lora_search.targets import module_tree, resolve, skeleton

    model = skeleton(spec.base.model, trust_remote_code=spec.base.trust_remote_code, revision=spec.base.revision)
    tree = module_tree(model)
    domain = spec.search.space.get("target_modules")
    dropout = spec.search.space.get("dropout")
    experts: dict[tuple[str, ...], Any] = {}
    for target in domain.probes() if domain else (Lora().target_modules,):
        found = resolve(tree, target)
        if found.parameters:
            experts.setdefault(tuple(sorted(found.parameters)), target)
        if found.parameters and max(dropout.probes() if dropout else (Lora().dropout,)) > 0:
            raise InputError(
                f"search.space.dropout: target set {target!r} holds fused experts of {tree.architecture}, which PEFT "
                "adapts without dropout only; set dropout: 0"
            )
    if len(experts) > 1:
        one, other, *_ = experts.values()
        raise InputError(
            f"search.space.target_modules: target sets {one!r} and {other!r} hold other fused experts of "
            f"{tree.architecture}; PEFT adapts the same in all adapters of a model, so let all sets that hold any hold "
            "the same"
        )
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    advice = refuse_long_rows(model, data.longest)
    with device_fails_host():
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
    )
    return summary, data


def fingerprint_of_base(spec: SweepSpec) -> str | None:
    """What tells its weights from others of the same name, on a host that has loaded it."""
    from lora_search.model import base_fingerprint, model_path

    return base_fingerprint(model_path(spec.base.model), spec.base.revision)


def require_base(spec: SweepSpec, known: str | None) -> None:
    """On a host that comes later, when it has loaded the base.

    Raises:
        NodeUnfit: its weights are other ones.
    """
    found = fingerprint_of_base(spec)
    if known is not None and found is not None and found != known:
        raise NodeUnfit(f"it has other weights by the name {spec.base.model}")


def one_base(found: Sequence[str | None]) -> str | None:
    """The fingerprint that all hosts found.

    Raises:
        InputError: they found several.
    """
    known = sorted({one for one in found if one is not None})
    if len(known) > 1:
        raise InputError(
            f"base.model: the nodes have other weights by that name (fingerprints {', '.join(o[:12] for o in known)}); "
            "put the same files on every node, or name a base.revision"
        )
    return known[0] if known else None


def refuse_other_material(before: Mapping[str, Any], what: Literal["data", "base"], found: str | None) -> None:
    """
    Args:
        before: the provenance of the sweep that is resumed.
        found: the fingerprint now.

    Raises:
        InputError: it was started on other data, or on another base of the same name.
    """
    was = before.get(what, {}).get("fingerprint")
    if was is not None and found is not None and was != found:
        raise InputError(
            f"--resume: the {what} has changed since the sweep began: found {found[:12]}, was {str(was)[:12]} "
            f"(fingerprints of the {'tokens' if what == 'data' else 'weights'})"
        )
