"""From what a sweep file says of target modules to the full names that PEFT is given."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lora_search.errors import InputError
from lora_search.spec import TARGET_SETS
from lora_search.targets.tree import LinearModule, ModuleTree

_QUERY_OR_VALUE = re.compile(
    r"^(q|v|w[qv]|query|value|[qv]_(proj|lin|attn)|to_[qv]|q_b_proj|kv_b_proj"  # apart; _b_: MLA's second factors
    r"|c_attn|w_?qkv|qkv|qkv_(proj|lin)|query_key_value|in_proj|w_pack|att_proj)$",  # fused
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Targets:
    """What an adapter is put on, in PEFT's two kinds, each by its full name."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    """The experts' fused weights (PEFT's `target_parameters`)."""


def resolve(tree: ModuleTree, target: str | Sequence[str]) -> Targets:
    """The weights of a model that a target names.

    Args:
        tree: of the model.
        target: the name of a target set; a list of module names, full or from a dot to the end, as in PEFT; or a
            regular expression that matches full names, with `re:` before it or without.

    Raises:
        InputError: the target is no set of this architecture, names something that is not there, or the output head.
    """
    if not isinstance(target, str):
        return _split(_by_names(tree, target))
    if target in TARGET_SETS:
        return _split(_by_set(tree, target))
    return _split(_by_pattern(tree, target))


def trainable_parameters(tree: ModuleTree, targets: Targets, rank: int) -> int:
    """How many numbers an adapter of this rank has: exactly what PEFT creates."""
    chosen = {*targets.modules, *targets.parameters}
    return sum(module.lora_parameters(rank) for module in tree.modules if module.name in chosen)


def available_sets(tree: ModuleTree) -> tuple[str, ...]:
    """The target sets that this architecture can give."""
    return tuple(name for name in TARGET_SETS if any(map(_members(name), tree.modules)))


def _members(name: str) -> Callable[[LinearModule], bool]:
    return {
        "attention-qv": lambda m: m.role == "attention" and bool(_QUERY_OR_VALUE.match(m.suffix)),
        "attention": lambda m: m.role == "attention",
        "mlp": lambda m: m.role == "mlp",
        "all-linear": lambda m: True,
    }[name]


def _by_set(tree: ModuleTree, name: str) -> list[LinearModule]:
    chosen = list(filter(_members(name), tree.modules))
    if not chosen:
        raise InputError(f"target_modules: {tree.architecture} has no modules for {name!r}; {_offer(tree)}")
    return chosen


def _by_names(tree: ModuleTree, names: Sequence[str]) -> list[LinearModule]:
    chosen: set[str] = set()
    for name in names:
        if tree.head and _names(name, tree.head):
            raise InputError(
                f"target_modules: {name!r} is the output head of {tree.architecture}, which is never adapted: a merge "
                "would change the embedding that it may share"
            )
        found = {module.name for module in tree.modules if _names(name, module.name)}
        if not found:
            raise InputError(f"target_modules: {tree.architecture} has no module {name!r}{_near(tree, name)}")
        chosen |= found
    return [module for module in tree.modules if module.name in chosen]


def _by_pattern(tree: ModuleTree, target: str) -> list[LinearModule]:
    try:
        pattern = re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise InputError(f"target_modules: {target!r} is no valid regular expression: {error}") from None
    chosen = [module for module in tree.modules if pattern.fullmatch(module.name)]
    if not chosen:
        raise InputError(
            f"target_modules: {target!r} is no target set, and as a regular expression it matches no module of "
            f"{tree.architecture}{_near(tree, target)}"
        )
    return chosen


def _names(wanted: str, full: str) -> bool:
    """PEFT's rule for lists: the whole name, or its end after a dot."""
    return full == wanted or full.endswith(f".{wanted}")


def _split(chosen: Iterable[LinearModule]) -> Targets:
    chosen = list(chosen)
    return Targets(
        tuple(module.name for module in chosen if module.kind != "experts"),
        tuple(module.name for module in chosen if module.kind == "experts"),
    )


def _near(tree: ModuleTree, found: str) -> str:
    known = [*available_sets(tree), *dict.fromkeys(module.suffix for module in tree.modules)]
    nearest = difflib.get_close_matches(found, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ";"
    return f"{hint} {_offer(tree)}"


def _offer(tree: ModuleTree) -> str:
    """What the architecture has, for an error message."""
    shapes = {module.suffix: f"{module.out_features}x{module.in_features}" for module in tree.modules}
    suffixes = ", ".join(f"{suffix} ({shape})" for suffix, shape in shapes.items())
    return f"it has the sets {', '.join(available_sets(tree))} and the modules {suffixes}"
