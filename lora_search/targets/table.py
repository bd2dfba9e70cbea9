"""What `lora-search targets` shows of a model, as values."""

from __future__ import annotations

from dataclasses import dataclass

from lora_search.errors import InputError
from lora_search.spec import TARGET_SETS
from lora_search.targets.resolve import resolve, trainable_parameters
from lora_search.targets.tree import ModuleTree

RANKS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class SuffixRow:
    """All modules of one name: how many there are, and their shapes."""

    suffix: str
    kind: str
    role: str
    shapes: tuple[str, ...]
    """out x in, or experts x out x in."""
    count: int


@dataclass(frozen=True)
class SetRow:
    """A target set: its size at each rank, or why this architecture cannot give it."""

    name: str
    suffixes: tuple[str, ...]
    modules: int
    trainable: dict[int, int]
    """Trainable parameters by rank."""
    unavailable: str | None


@dataclass(frozen=True)
class TargetTable:
    """A model's modules and target sets."""

    model: str
    architecture: str
    total_parameters: int
    head: str | None
    routers: int
    modules: tuple[SuffixRow, ...]
    sets: tuple[SetRow, ...]

    def share(self, trainable: int) -> float:
        """Of the base's parameters."""
        return trainable / self.total_parameters


def target_table(model: str, tree: ModuleTree) -> TargetTable:
    """Group a tree's modules by name, and size each target set."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for module in tree.modules:
        experts = f"{module.experts}x" if module.kind == "experts" else ""
        shape = f"{experts}{module.out_features}x{module.in_features}"
        groups.setdefault((module.suffix, module.kind, module.role), []).append(shape)
    rows = tuple(
        SuffixRow(suffix, kind, role, tuple(dict.fromkeys(shapes)), len(shapes))
        for (suffix, kind, role), shapes in groups.items()
    )
    sets = tuple(_set_row(tree, name) for name in TARGET_SETS)
    return TargetTable(model, tree.architecture, tree.total_parameters, tree.head, len(tree.routers), rows, sets)


def _set_row(tree: ModuleTree, name: str) -> SetRow:
    try:
        targets = resolve(tree, name)
    except InputError:
        reason = f"{tree.architecture} has no such modules"
        return SetRow(name, (), 0, {}, reason)
    chosen = {*targets.modules, *targets.parameters}
    suffixes = tuple(dict.fromkeys(module.suffix for module in tree.modules if module.name in chosen))
    sizes = {rank: trainable_parameters(tree, targets, rank) for rank in RANKS}
    return SetRow(name, suffixes, len(chosen), sizes, None)
