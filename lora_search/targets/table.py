"""What `lora-search targets` shows of a model, as values."""

from __future__ import annotations

from dataclasses import dataclass

from lora_search.spec import TARGET_SETS
from lora_search.targets.resolve import resolve, trainable_parameters
from lora_search.targets.sets import available_sets, why_unavailable
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
    share: dict[int, float]
    """The same, of the base's parameters."""
    unavailable: str | None


@dataclass(frozen=True)
class TargetTable:
    """A model's modules and target sets."""

    model: str
    architecture: str
    total_parameters: int
    head: str | None
    routers: int
    refused: tuple[str, ...]
    """Names that PEFT does not adapt in this architecture."""
    modules: tuple[SuffixRow, ...]
    sets: tuple[SetRow, ...]


def target_table(model: str, tree: ModuleTree) -> TargetTable:
    """Group a tree's modules by name, and size each target set."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for module in tree.modules:
        groups.setdefault((module.suffix, module.kind, module.role), []).append(module.shape)
    rows = tuple(
        SuffixRow(suffix, kind, role, tuple(dict.fromkeys(shapes)), len(shapes))
        for (suffix, kind, role), shapes in groups.items()
    )
    return TargetTable(
        model=model,
        architecture=tree.architecture,
        total_parameters=tree.total_parameters,
        head=tree.head,
        routers=len(tree.routers),
        refused=tuple(dict.fromkeys(module.suffix for module in tree.refused)),
        modules=rows,
        sets=tuple(_set_row(tree, name) for name in TARGET_SETS),
    )


def _set_row(tree: ModuleTree, name: str) -> SetRow:
    if name not in available_sets(tree):
        return SetRow(name, (), 0, {}, {}, why_unavailable(tree, name))
    targets = resolve(tree, name)
    chosen = {*targets.modules, *targets.parameters}
    suffixes = tuple(dict.fromkeys(module.suffix for module in tree.modules if module.name in chosen))
    sizes = {rank: trainable_parameters(tree, targets, rank) for rank in RANKS}
    shares = {rank: size / tree.total_parameters for rank, size in sizes.items()}
    return SetRow(name, suffixes, len(chosen), sizes, shares, None)
