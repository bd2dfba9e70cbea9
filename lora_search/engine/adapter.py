"""A trial's adapter as one vector: PEFT's own parameters, laid end to end, and their gradients likewise.

Legend: P trainable parameters, R rank, S ranks of several layers together, I and O in- and out-features of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel

Places = tuple[int, ...]
"""The numbers of linear layers of the base."""


@dataclass(frozen=True)
class Up:
    """B of one layer, as views into the vectors."""

    b_OR: torch.Tensor
    grad_b_OR: torch.Tensor


@dataclass(frozen=True)
class Down:
    """A of layers that share an input, one above the other, as views into the vectors."""

    a_SI: torch.Tensor
    grad_a_SI: torch.Tensor
    spans: Mapping[int, slice]
    """Each layer's share of S."""


class FlatAdapter:
    """The parameters that PEFT made under a name, moved into one float32 vector without PEFT noticing.

    Norm, clipping and the optimiser each take one operation over a trial this way, whatever its layers; and A of the
    layers that read the same input (query, key and value) is one matrix, for one product.
    """

    def __init__(
        self,
        model: PeftModel,
        name: str,
        places: Mapping[str, int],
        siblings: Iterable[Places],
        scaling: float,
        dtype: torch.dtype,
    ):
        """
        Args:
            model: holds the adapter already.
            places: the number of each linear layer of the base, by its name there.
            siblings: the layers that share an input; each layer stands in one of them.
            scaling: the factor on B A x.
            dtype: of the products; where it is not float32, the layers work on a copy (see `refresh`).
        """
        self.scaling = scaling
        self.parameters: dict[str, nn.Parameter] = {
            key: parameter for key, parameter in model.named_parameters() if f".{name}." in key or key.endswith(name)
        }
        pairs = _pairs(model, name, places)
        ordered = [pairs[place][0] for group in siblings for place in group if place in pairs]
        ordered += [b for _, b in pairs.values()]
        seen = set(map(id, ordered))
        ordered += [parameter for parameter in self.parameters.values() if id(parameter) not in seen]
        size = sum(parameter.numel() for parameter in ordered)
        self.vector_P = nn.Parameter(torch.empty(size, dtype=torch.float32, device=ordered[0].device))
        self.gradient_P = torch.zeros_like(self.vector_P)
        self.vector_P.grad = self.gradient_P
        self._working_P = self.vector_P.data if dtype == torch.float32 else torch.empty_like(self.vector_P, dtype=dtype)
        spans = self._move_in(ordered)
        self._downs = {place: (spans[id(a)], a.shape[1]) for place, (a, _) in pairs.items()}
        self._stacks: dict[Places, Down | None] = {}
        self.ups = {
            place: Up(self._working_P[spans[id(b)]].view_as(b), self.gradient_P[spans[id(b)]].view_as(b))
            for place, (_, b) in pairs.items()
        }
        self.refresh()

    def _move_in(self, ordered: Iterable[nn.Parameter]) -> dict[int, slice]:
        """Make each parameter a view into the vector; where it stands, by its identity."""
        spans: dict[int, slice] = {}
        start = 0
        for parameter in ordered:
            span = slice(start, start + parameter.numel())
            self.vector_P.data[span].copy_(parameter.data.reshape(-1))
            parameter.data = self.vector_P.data[span].view_as(parameter)
            parameter.grad = self.gradient_P[span].view_as(parameter)
            spans[id(parameter)] = span
            start = span.stop
        return spans

    def down(self, siblings: Places) -> Down | None:
        """A of those of the layers that are adapted; they are all of a group, or one. None where none is adapted."""
        if siblings not in self._stacks:
            self._stacks[siblings] = self._stack([place for place in siblings if place in self._downs])
        return self._stacks[siblings]

    def _stack(self, adapted: list[int]) -> Down | None:
        if not adapted:
            return None
        spans: dict[int, slice] = {}
        start = 0
        for place in adapted:
            span, features = self._downs[place]
            spans[place] = slice(start, start + (span.stop - span.start) // features)
            start = spans[place].stop
        whole = slice(self._downs[adapted[0]][0].start, self._downs[adapted[-1]][0].stop)
        features = self._downs[adapted[0]][1]
        return Down(self._working_P[whole].view(start, features), self.gradient_P[whole].view(start, features), spans)

    @property
    def size(self) -> int:
        """Trainable parameters."""
        return self.vector_P.numel()

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the working copy up to the parameters; after every change of them."""
        if self._working_P.dtype != torch.float32:
            self._working_P.copy_(self.vector_P)


def _pairs(model: PeftModel, name: str, places: Mapping[str, int]) -> dict[int, tuple[nn.Parameter, nn.Parameter]]:
    """A and B of each adapted layer, by its place."""
    pairs = {}
    for module_name, place in places.items():
        module = model.base_model.model.get_submodule(module_name)
        downs = getattr(module, "lora_A", None)
        if downs is not None and name in downs:
            pairs[place] = (downs[name].weight, module.lora_B[name].weight)
    return pairs
