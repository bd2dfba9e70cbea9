"""A trial's adapter as one vector: PEFT's own parameters, laid end to end, and their gradients likewise.

Where the base is on several devices it is one vector on each: an adapter's weights are where their layers are. B stands
in it transposed, a rank's numbers in a row as in A, so that adapters of any ranks can be stacked by copying rows.

Legend: P trainable parameters, R rank, S ranks of several layers together, I and O in- and out-features of a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel

Places = tuple[int, ...]
"""The numbers of linear layers of the base."""


@dataclass(frozen=True)
class Up:
    """B of one layer, transposed, as views into the vectors."""

    b_RO: torch.Tensor
    grad_b_RO: torch.Tensor


@dataclass(frozen=True)
class Down:
    """A of layers that share an input, one above the other, as views into the vectors."""

    a_SI: torch.Tensor
    grad_a_SI: torch.Tensor
    spans: Mapping[int, slice]
    """Each layer's share of S."""


class Piece:
    """Parameters of one device, moved into one float32 vector without PEFT noticing."""

    def __init__(self, parameters: Sequence[nn.Parameter], transposed: Collection[int], dtype: torch.dtype) -> None:
        """
        Args:
            transposed: of which of them, by identity, columns stand end to end.
            dtype: of the products; where it is not float32, the layers work on a copy (see `refresh`).
        """
        size = sum(parameter.numel() for parameter in parameters)
        self.vector_P = nn.Parameter(torch.empty(size, dtype=torch.float32, device=parameters[0].device))
        self.gradient_P = torch.zeros_like(self.vector_P)
        self.vector_P.grad = self.gradient_P
        self.working_P = self.vector_P.data if dtype == torch.float32 else torch.empty_like(self.vector_P, dtype=dtype)
        self.spans: dict[int, slice] = {}
        """Where each parameter stands, by its identity."""
        start = 0
        for parameter in parameters:
            span = slice(start, start + parameter.numel())
            turned = id(parameter) in transposed
            shape = parameter.shape[::-1] if turned else parameter.shape
            values, gradient = self.vector_P.data[span].view(shape), self.gradient_P[span].view(shape)
            parameter.data = (values.t() if turned else values).copy_(parameter.data)
            parameter.grad = gradient.t() if turned else gradient
            self.spans[id(parameter)] = span
            start = span.stop

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the working copy up to the parameters."""
        if self.working_P.dtype != torch.float32:
            self.working_P.copy_(self.vector_P)


class FlatAdapter:
    """The parameters that PEFT made under a name, as one vector a device.

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
            dtype: of the products.
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
        ranks = {id(b): b.shape[1] for _, b in pairs.values()}
        devices = dict.fromkeys(parameter.device for parameter in ordered)
        self.pieces = tuple(Piece([p for p in ordered if p.device == device], ranks, dtype) for device in devices)
        on = {id(parameter): piece for piece in self.pieces for parameter in ordered if id(parameter) in piece.spans}
        self._order = [
            (self.pieces.index(on[id(p)]), on[id(p)].spans[id(p)], ranks.get(id(p), p.numel())) for p in ordered
        ]
        """Of every parameter: which piece, where in it, and in how many rows: of B its ranks, of others all numbers."""
        self._downs = {place: (on[id(a)], on[id(a)].spans[id(a)], a.shape[1]) for place, (a, _) in pairs.items()}
        self._stacks: dict[Places, Down | None] = {}
        self.groups = tuple(siblings)
        self.ups = {place: _up(on[id(b)], b) for place, (_, b) in pairs.items()}
        self.refresh()

    def down(self, siblings: Places) -> Down | None:
        """A of those of the layers that are adapted; they are all of a group, or one. None where none is adapted."""
        if siblings not in self._stacks:
            self._stacks[siblings] = self._stack([place for place in siblings if place in self._downs])
        return self._stacks[siblings]

    @cached_property
    def records(self) -> npt.NDArray[np.int64]:
        """Where its matrices are, for whoever finds them by address: (`groups`, 1 + layers of the largest group, 4).

        Of each group first A of its layers together, then B of each layer: its address, that of its gradient, its
        ranks, and where they begin among the group's. Zeros where nothing is adapted.
        """
        records = np.zeros((len(self.groups), 1 + max(map(len, self.groups), default=0), 4), np.int64)
        for of_group, places in zip(records, self.groups, strict=True):
            down = self.down(places)
            if down is None:
                continue
            of_group[0] = (down.a_SI.data_ptr(), down.grad_a_SI.data_ptr(), len(down.a_SI), 0)
            for record, place in zip(of_group[1:], places, strict=False):
                if (span := down.spans.get(place)) is not None:
                    up = self.ups[place]
                    record[:] = (up.b_RO.data_ptr(), up.grad_b_RO.data_ptr(), len(up.b_RO), span.start)
        return records

    def _stack(self, adapted: list[int]) -> Down | None:
        if not adapted:
            return None
        spans: dict[int, slice] = {}
        start = 0
        for place in adapted:
            _, span, features = self._downs[place]
            spans[place] = slice(start, start + (span.stop - span.start) // features)
            start = spans[place].stop
        piece, first, features = self._downs[adapted[0]]
        whole = slice(first.start, self._downs[adapted[-1]][1].stop)
        return Down(piece.working_P[whole].view(start, features), piece.gradient_P[whole].view(start, features), spans)

    @property
    def size(self) -> int:
        """Trainable parameters."""
        return sum(piece.vector_P.numel() for piece in self.pieces)

    @property
    def vectors(self) -> list[nn.Parameter]:
        return [piece.vector_P for piece in self.pieces]

    @property
    def gradients(self) -> list[torch.Tensor]:
        return [piece.gradient_P for piece in self.pieces]

    def clear_gradients(self) -> None:
        for piece in self.pieces:
            piece.gradient_P.zero_()

    def refresh(self) -> None:
        """Bring the working copies up to the parameters; after every change of them."""
        for piece in self.pieces:
            piece.refresh()

    def joined(self, of_pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """One vector of what the pieces have, in an order that does not depend on which device has what; a copy.

        Every parameter stands in it as PEFT has it.
        """
        device = of_pieces[0].device
        parts = [of_pieces[index][span].detach().view(rows, -1) for index, span, rows in self._order]
        return torch.cat([part.t().reshape(-1).to(device) for part in parts])

    def parted(self, vector_P: torch.Tensor) -> list[torch.Tensor]:
        """What each piece has of a joined vector, on its device; copies."""
        parts = [torch.empty_like(piece.vector_P, requires_grad=False) for piece in self.pieces]
        start = 0
        for index, span, rows in self._order:
            stop = start + span.stop - span.start
            parts[index][span].view(rows, -1).copy_(vector_P[start:stop].view(-1, rows).t())
            start = stop
        return parts


def _up(piece: Piece, b: nn.Parameter) -> Up:
    span, shape = piece.spans[id(b)], b.shape[::-1]
    return Up(piece.working_P[span].view(shape), piece.gradient_P[span].view(shape))


def _pairs(model: PeftModel, name: str, places: Mapping[str, int]) -> dict[int, tuple[nn.Parameter, nn.Parameter]]:
    """A and B of each adapted layer, by its place."""
    pairs = {}
    for module_name, place in places.items():
        module = model.base_model.model.get_submodule(module_name)
        downs = getattr(module, "lora_A", None)
        if downs is not None and name in downs:
            pairs[place] = (downs[name].weight, module.lora_B[name].weight)
    return pairs
