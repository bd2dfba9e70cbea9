"""A gated MLP as an evaluation runs through it on a CPU: what lies between its products, some rows at a time.

Its wide tensors, of all rows, would leave a core's cache after every operation and come back for the next. In training,
where a trial has few rows and the gradients need those tensors, nothing is won by this (analysis/benchmarks/NOTES.md).

Legend: N tokens of the pack, n those of one trial, m some of them; E hidden features, I those between the products; S
ranks of a trial's layers with one input together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from lora_search.engine.layers import LinearSite
from lora_search.engine.lora import Adapted, adapted_behind
from lora_search.engine.pack import Pack, Part, running
from lora_search.engine.products import pieces, product
from lora_search.engine.source import source_of

LLAMAS = inspect.getsource(LlamaMLP.forward)
"""down(act(gate(x)) * up(x)). Transformers writes it out anew for every architecture that has it: 124 of them."""


def attach_gated(model: nn.Module, sites: Mapping[str, LinearSite]) -> None:
    """Have evaluations run through every MLP that is Llama's, under whatever name, as here; others as before.

    Args:
        sites: the model's linear layers, by name.
    """
    for name, module in model.named_modules():
        layers = [sites[of] for of in (f"{name}.gate_proj", f"{name}.up_proj", f"{name}.down_proj") if of in sites]
        if len(layers) == 3 and "forward" not in vars(module) and source_of(type(module).forward) == LLAMAS:
            module.forward = GatedSite(module, *layers).forward


class GatedSite:
    """A gated MLP of the base; anybody but an evaluation finds it as it was."""

    def __init__(self, module: nn.Module, gate: LinearSite, up: LinearSite, down: LinearSite) -> None:
        self._module = cast("LlamaMLP", module)
        self._gate, self._up, self._down = gate, up, down
        self._alone: Callable[[torch.Tensor], torch.Tensor] = module.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pack = running()
        if pack is None or pack.visits is not None or x.dtype != torch.float32 or torch.is_grad_enabled():
            return self._alone(x)
        x_NE = x.reshape(-1, x.shape[-1])
        if len(x_NE) != pack.parts[-1].tokens.stop or self._gate.siblings != self._up.siblings:
            return self._alone(x)
        return self._evaluated(pack, x_NE).view(*x.shape[:-1], -1)

    def _evaluated(self, pack: Pack, x_NE: torch.Tensor) -> torch.Tensor:
        rows = [part.tokens for part in pack.parts]
        halved_NE = x_NE.to(self._gate.dtype)
        gate_NI, up_NI = self._gate.product_NO(halved_NE, rows), self._up.product_NO(halved_NE, rows)
        downs = [self._inner_(index, part, x_NE, gate_NI, up_NI) for index, part in enumerate(pack.parts)]
        y_NE = self._down.whole_NO(self._down.product_NO(gate_NI, rows))
        for one, down_nS in filter(None, downs):
            one.add(self._down.place, y_NE[one.rows], down_nS)
        return y_NE

    def _inner_(
        self, index: int, part: Part, x_NE: torch.Tensor, gate_NI: torch.Tensor, up_NI: torch.Tensor
    ) -> tuple[Adapted, torch.Tensor] | None:
        """Of one trial's rows act(gate) * up, in the place of gate's product with the frozen weight.

        Returns:
            The trial's adapter on the last layer, with what its A makes of it.
        """
        before, behind = (adapted_behind(index, part, site.siblings) for site in (self._gate, self._down))
        before_nS = None if before is None else product(x_NE[part.tokens], before.down.a_SI)
        downs = []
        for piece in pieces(part.tokens, gate_NI.shape[1]):
            gate_mI, up_mI = self._gate.whole_NO(gate_NI[piece]), self._up.whole_NO(up_NI[piece])
            if before is not None and before_nS is not None:
                before_mS = before_nS[piece.start - part.tokens.start : piece.stop - part.tokens.start]
                before.add(self._gate.place, gate_mI, before_mS)
                before.add(self._up.place, up_mI, before_mS)
            inner_mI = self._module.act_fn(gate_mI).mul_(up_mI)
            if behind is not None:
                downs.append(product(inner_mI, behind.down.a_SI))
            gate_NI[piece] = inner_mI
        return None if behind is None else (behind, torch.cat(downs))
