"""What is said of a target that cannot be used: what was found, why not, and what the architecture has."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from lora_search.targets.sets import available_sets, why_unavailable
from lora_search.targets.tree import ModuleTree


def unavailable(tree: ModuleTree, name: str) -> str:
    """Of a target set that the architecture does not give."""
    return f"target_modules: {name!r} is not available: {why_unavailable(tree, name)}; {offer(tree)}"


def unmatched(tree: ModuleTree, found: str, matches: Callable[[str], bool]) -> str:
    """Of a name or regular expression that matches nothing that can be adapted."""
    reason = _why_never(tree, matches)
    if reason:
        return f"target_modules: {found!r} is {reason}; {offer(tree)}"
    return f"target_modules: {found!r} matches no module of {tree.architecture}{_nearest(tree, found)} {offer(tree)}"


def offer(tree: ModuleTree) -> str:
    """What the architecture has."""
    shapes: dict[str, dict[str, None]] = {}
    for module in tree.modules:
        shapes.setdefault(module.suffix, {})[module.shape] = None
    modules = ", ".join(f"{suffix} ({', '.join(found)})" for suffix, found in shapes.items())
    return f"it has the sets {', '.join(available_sets(tree))} and the modules {modules}"


def _why_never(tree: ModuleTree, matches: Callable[[str], bool]) -> str | None:
    if tree.head and matches(tree.head):
        return (
            f"the output head of {tree.architecture} ({tree.head}), which is never adapted: "
            "merging would change the embedding too where they share their weights"
        )
    if any(map(matches, tree.routers)):
        return "a router, which is never adapted: that would change which experts or tokens are picked"
    if any(matches(module.name) for module in tree.refused):
        return f"a module that PEFT does not adapt in {tree.architecture}"
    return None


def _nearest(tree: ModuleTree, found: str) -> str:
    suffixes = [*dict.fromkeys(module.suffix for module in tree.modules)]
    if found in suffixes:  # alone it is read as a regular expression, and that has to match full names
        return f"; did you mean the list [{found}]?"
    nearest = difflib.get_close_matches(found, [*available_sets(tree), *suffixes], n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ";"
