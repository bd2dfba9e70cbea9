"""Which parameter of the model each tensor of the published weights becomes.

The two are named alike in most architectures, but not in all: transformers 5 renames, and fuses a mixture's experts,
while it loads. Its own rules are asked here, and where one source becomes a part of a parameter, which part is found by
sending numbered matrices through its own conversion.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lora_search.merge.values import NotByShards

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Block:
    """Where a published matrix stands in a fused parameter."""

    parameter: str
    expert: int | None
    """None where the parameter has two dimensions."""
    row: int
    """In blocks of the matrix's own height."""
    column: int
    transposed: bool


@dataclass
class Names:
    """Published tensors by what they become."""

    whole: dict[str, str] = field(default_factory=dict)
    """The parameter that a tensor is all of, by the tensor's key."""
    fused: dict[str, list[str]] = field(default_factory=dict)
    """The tensors that are parts of a parameter, by the parameter's name."""
    _converters: dict[str, Any] = field(default_factory=dict)

    def blocks(self, parameter: str, shapes: Mapping[str, tuple[int, ...]], fused: tuple[int, ...]) -> dict[str, Block]:
        """Where each published matrix stands in a fused parameter, by its key.

        Args:
            shapes: of the published tensors.
            fused: shape of the parameter.

        Raises:
            NotByShards: the parts are no equal blocks.
        """
        keys = self.fused[parameter]
        own = {shapes[key] for key in keys}
        if len(own) != 1 or len(next(iter(own))) != 2:
            raise NotByShards(f"{parameter} is fused from tensors of unequal shapes")
        numbered = self._converted(parameter)
        blocks = {key: _find(number, numbered, parameter) for number, key in enumerate(keys)}
        height, width = next(iter(own))
        if next(iter(blocks.values())).transposed:
            height, width = width, height
        scaled = (numbered.shape[-2] // 2 * height, numbered.shape[-1] // 2 * width)
        if fused != (*numbered.shape[:-2], *scaled):
            raise NotByShards(f"{parameter} has the shape {fused}, and its published parts another")
        return blocks

    def _converted(self, parameter: str) -> torch.Tensor:
        """The parameter as it is made of 2 x 2 matrices, the entries of the n-th numbered from 4 n on."""
        converter, patterns = self._converters[parameter]
        for number, (key, pattern) in enumerate(zip(self.fused[parameter], patterns, strict=True)):
            converter.add_tensor(parameter, key, pattern, torch.arange(4 * number, 4 * number + 4).view(2, 2))
        try:
            (made,) = converter.convert(parameter).values()
        except Exception as error:  # of an operation that needs more than the matrices: whatever it raises
            raise NotByShards(f"{parameter} is made in a way of its own ({type(error).__name__}: {error})") from None
        tensor = made[0] if isinstance(made, list) else made
        if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (2, 3):
            raise NotByShards(f"{parameter} is made in a way of its own")
        return tensor


def parameter_names(keys: Iterable[str], model: PreTrainedModel) -> Names:
    """What becomes of published tensors in a model, by transformers' own rules.

    Raises:
        NotByShards: this version of transformers has no such rules, or others.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        rules = get_model_conversion_mapping(model)
    except (ImportError, TypeError) as error:
        raise NotByShards(f"this transformers does not tell how it names weights: {error}") from None
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    there = model.state_dict()
    prefix = model.base_model_prefix
    names = Names()
    for key in sorted(keys, key=dot_natural_key):  # the order in which it stacks experts
        name, pattern = rename_source_key(key, renamings, converters, prefix, there)
        if name not in there and key in there:
            name, pattern = rename_source_key(key, [], [], prefix, there)
        if name not in there:
            continue  # of another head or a vision tower; the model does not load it, and it is copied as it is
        if pattern is None:
            names.whole[key] = name
            continue
        names.fused.setdefault(name, []).append(key)
        names._converters.setdefault(name, (deepcopy(by_pattern[pattern]), []))[1].append(pattern)
    return names


def _find(number: int, numbered: torch.Tensor, parameter: str) -> Block:
    """Where the n-th matrix came to stand."""
    first = torch.nonzero(numbered == 4 * number)
    if len(first) == 1:
        *expert, row, column = first[0].tolist()
        found = (numbered[expert[0]] if expert else numbered)[row : row + 2, column : column + 2]
        matrix = torch.arange(4 * number, 4 * number + 4).view(2, 2)
        for transposed in (False, True):
            if row % 2 == column % 2 == 0 and torch.equal(found, matrix.T if transposed else matrix):
                return Block(parameter, expert[0] if expert else None, row // 2, column // 2, transposed)
    raise NotByShards(f"{parameter} is not made of its published parts as they are")
