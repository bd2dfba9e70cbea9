"""The target sets of an architecture: which modules make each, by what they are for."""

from __future__ import annotations

from lora_search.spec import TARGET_SETS
from lora_search.targets.role import is_query_or_value
from lora_search.targets.tree import LinearModule, ModuleTree


def in_set(name: str, module: LinearModule) -> bool:
    """Whether a module belongs to a target set."""
    match name:
        case "attention-qv":
            return module.role == "attention" and is_query_or_value(module.name)
        case "attention" | "mlp":
            return module.role == name
        case _:
            return module.role != "tower"


def available_sets(tree: ModuleTree) -> tuple[str, ...]:
    """The target sets that this architecture can give."""
    return tuple(name for name in TARGET_SETS if any(in_set(name, module) for module in tree.modules))


def why_unavailable(tree: ModuleTree, name: str) -> str:
    """Why the architecture cannot give a target set."""
    if any(in_set(name, module) for module in tree.refused):
        return f"PEFT does not adapt its modules in {tree.architecture}"
    lacking = {"attention-qv": "query or value projections", "attention": "attention", "mlp": "feed-forward modules"}
    return f"{tree.architecture} has no {lacking.get(name, 'linear modules')}"
