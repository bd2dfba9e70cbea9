"""The corners of a search space, as far as memory goes: its smallest and largest trial on each target set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_search.memory.values import TrialShape, with_targets_of_all
from lora_search.space import FIRST_GUESS
from lora_search.spec import SweepSpec
from lora_search.spec.schema import Lora, Training
from lora_search.targets import ModuleTree, resolve, trainable_parameters

if TYPE_CHECKING:
    from lora_search.memory.estimate import BaseMemory


@dataclass(frozen=True)
class Corner:
    """A configuration at an extreme of the space, and what of it takes memory."""

    target_modules: str | list[str]
    size: str
    """smallest, common or largest on its target set."""
    shape: TrialShape

    @property
    def target(self) -> str:
        """The target set in words."""
        return self.target_modules if isinstance(self.target_modules, str) else ", ".join(self.target_modules)


def corners(spec: SweepSpec, tree: ModuleTree, length: int) -> tuple[Corner, ...]:
    """Smallest, common and largest trial on each target set, in the order of the sets' parameters.

    Raises:
        InputError: a target set is none of this base.
    """
    sets = sorted(
        ((target, resolve(tree, target)) for target in values(spec, "target_modules")),
        key=lambda pair: trainable_parameters(tree, pair[1], 1),
    )
    ranks, batches, dropouts = values(spec, "rank"), values(spec, "batch_size"), values(spec, "dropout")
    found = []
    for target, targets in sets:
        smallest = TrialShape(targets, min(ranks), min(dropouts) > 0, min(batches), length)
        largest = TrialShape(targets, max(ranks), max(dropouts) > 0, max(batches), length)
        common = replace(largest, rank=_common(spec), batch_size=min(batches))
        shapes = {"smallest": smallest, "common": common, "largest": largest}
        kept: dict[TrialShape, str] = {}
        for size, shape in shapes.items():
            kept.setdefault(shape, size)
        found += [Corner(target, size, shape) for shape, size in kept.items()]
    return tuple(found)


def smallest(found: Sequence[Corner], memory: BaseMemory) -> Corner:
    """The corner that takes the fewest bytes."""
    return min(found, key=lambda corner: memory.host([corner.shape]).total)


def largest(found: Sequence[Corner], memory: BaseMemory) -> Corner:
    """The corner that takes the most bytes: not always the one with most parameters, for what counts as much is how far
    down a gradient goes."""
    # Where an evaluation is more than a step of one trial, several take as much, and differ in company.
    return max(found, key=lambda corner: (memory.host([corner.shape]).total, memory.trial(corner.shape).total))


@dataclass(frozen=True)
class Crowd:
    """As many trials as there may be at once, each as large as the space allows, whatever the others' target sets."""

    alone: TrialShape
    resident: TrialShape
    """That with the most state."""
    passing: TrialShape | None
    """What one takes of a pass with trials of all target sets, as if they were its own too; None where none share."""

    @classmethod
    def of(cls, found: Sequence[Corner], memory: BaseMemory) -> Crowd:
        sharing = [corner for corner in found if memory.shares_passes(corner.shape)]
        passing = None
        if sharing:
            union = with_targets_of_all([corner.shape for corner in sharing])[0].targets
            passing = replace(largest(sharing, memory).shape, targets=union)
        resident = max((corner.shape for corner in found), key=lambda shape: memory.trial(shape).state)
        return cls(largest(found, memory).shape, resident, passing)

    def total(self, count: int, memory: BaseMemory) -> int:
        """Bytes of a host with so many."""
        if count < 2:
            return memory.host([self.alone] * count).total
        passing = [] if self.passing is None else [self.passing] * count
        if not memory.shares_passes(self.alone):
            passing.append(self.alone)  # in a pass of its own, which may take more
        return memory.host([self.resident] * count, passing).total


def values(spec: SweepSpec, name: str) -> tuple[Any, ...]:
    """The extremes of a parameter, searched or not; of a choice, all of its values."""
    domain = spec.search.space.get(name)
    if domain is not None:
        return tuple(domain.probes())
    if name in Training.model_fields:
        return (getattr(spec.training, name),)
    return (Lora.model_fields[name].default,)


def _common(spec: SweepSpec) -> int:
    """The guides' rank, or what of the space comes nearest."""
    ranks: tuple[int, ...] = values(spec, "rank")
    domain = spec.search.space.get("rank")
    guess = int(FIRST_GUESS["rank"])
    return guess if domain is None or domain.contains(guess) else min(ranks, key=lambda rank: abs(rank - guess))
