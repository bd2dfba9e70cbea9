"""From what a sweep file says of target modules to the full names that PEFT is given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from lora_search.errors import InputError
from lora_search.spec import TARGET_SETS
from lora_search.targets.messages import offer, unavailable, unmatched
from lora_search.targets.sets import in_set
from lora_search.targets.tree import LinearModule, ModuleTree


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
        InputError: the target is no set of this architecture, or names something that is not there, the output head,
            a router, or what PEFT does not adapt in this architecture.
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


def _by_set(tree: ModuleTree, name: str) -> list[LinearModule]:
    chosen = [module for module in tree.modules if in_set(name, module)]
    if not chosen:
        raise InputError(unavailable(tree, name))
    return chosen


def _by_names(tree: ModuleTree, names: Sequence[str]) -> list[LinearModule]:
    if not names:
        raise InputError(f"target_modules: found an empty list; {offer(tree)}")
    chosen: set[str] = set()
    for name in names:
        matches = partial(_names, name)
        found = {module.name for module in tree.modules if matches(module.name)}
        if not found or (tree.head and matches(tree.head)):
            raise InputError(unmatched(tree, name, matches))
        chosen |= found
    return [module for module in tree.modules if module.name in chosen]


def _by_pattern(tree: ModuleTree, target: str) -> list[LinearModule]:
    source = target.removeprefix("re:")
    try:
        pattern = re.compile(source)
    except re.error as error:
        raise InputError(f"target_modules: {target!r} is no valid regular expression: {error}; {offer(tree)}") from None
    chosen = [module for module in tree.modules if pattern.fullmatch(module.name)]
    # `.*` means everything that can be adapted; a pattern that spells the head out means the head.
    if not chosen or (tree.head and pattern.fullmatch(tree.head) and tree.head.rpartition(".")[2] in source):
        raise InputError(unmatched(tree, target, lambda full: pattern.fullmatch(full) is not None))
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
