"""A trial's adapter as one vector: PEFT's own parameters, laid end to end, and their gradients likewise.

Legend: P trainable parameters, R rank, I and O in- and out-features of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class LayerAdapter:
    """The low-rank pair of one layer, as views into the vectors."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    grad_a_RI: torch.Tensor
    grad_b_OR: torch.Tensor


class FlatAdapter:
    """The parameters that PEFT made under a name, moved into one float32 vector without PEFT noticing.

    Norm, clipping and the optimiser each take one operation over a trial this way, whatever its layers.
    """

    def __init__(self, model: PeftModel, name: str, places: Mapping[str, int], scaling: float, dtype: torch.dtype):
        """
        Args:
            model: holds the adapter already.
            places: the number of each linear layer of the base, by its name there.
            scaling: the factor on B A x.
            dtype: of the products; where it is not float32, the layers work on a copy (see `refresh`).
        """
        self.scaling = scaling
        self.parameters: dict[str, nn.Parameter] = {
            key: parameter for key, parameter in model.named_parameters() if f".{name}." in key or key.endswith(name)
        }
        first = next(iter(self.parameters.values()))
        size = sum(parameter.numel() for parameter in self.parameters.values())
        self.vector_P = nn.Parameter(torch.empty(size, dtype=torch.float32, device=first.device))
        self.gradient_P = torch.zeros_like(self.vector_P)
        self.vector_P.grad = self.gradient_P
        self._working_P = self.vector_P.data if dtype == torch.float32 else torch.empty_like(self.vector_P, dtype=dtype)
        spans: dict[int, slice] = {}
        start = 0
        for parameter in self.parameters.values():
            span = slice(start, start + parameter.numel())
            self.vector_P.data[span].copy_(parameter.data.reshape(-1))
            parameter.data = self.vector_P.data[span].view_as(parameter)
            parameter.grad = self.gradient_P[span].view_as(parameter)
            spans[id(parameter)] = span
            start = span.stop
        self.layers = {
            place: layer
            for module_name, place in places.items()
            if (layer := self._layer(model.base_model.model.get_submodule(module_name), name, spans)) is not None
        }
        self.refresh()

    def _layer(self, module: nn.Module, name: str, spans: Mapping[int, slice]) -> LayerAdapter | None:
        downs = getattr(module, "lora_A", None)
        if downs is None or name not in downs:
            return None
        a: nn.Parameter = downs[name].weight
        b: nn.Parameter = module.lora_B[name].weight  # type: ignore[index, union-attr]
        span_a, span_b = spans[id(a)], spans[id(b)]
        return LayerAdapter(
            self._working_P[span_a].view_as(a),
            self._working_P[span_b].view_as(b),
            self.gradient_P[span_a].view_as(a),
            self.gradient_P[span_b].view_as(b),
        )

    @property
    def size(self) -> int:
        """Trainable parameters."""
        return self.vector_P.numel()

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the working copy up to the parameters; after every change of them."""
        if self._working_P.dtype != torch.float32:
            self._working_P.copy_(self.vector_P)
