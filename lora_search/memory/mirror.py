"""What the engine's layers hold and pass on, as layers that hold as much and compute nothing.

They stand in the place of `engine/layers.py`, `engine/attention.py` and `engine/forward.py` in a model on the meta
device. Where the engine keeps more or less than before, this file follows (`tests/test_memory.py` compares them).

Legend: N tokens of the pack, M targets; I and O in- and out-features; R rank; H heads; S sequences of L tokens, D
features of a head; E features of a hidden state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lora_search.memory.values import Setup
from lora_search.targets import ModuleTree

NAME = "lora_search_shapes"


@dataclass
class Pass:
    """One pass over a pack of like sequences."""

    setup: Setup
    sequences: int
    length: int
    rank: int
    dropout: bool
    adapted: frozenset[str]
    """Full names of the adapted layers."""
    draws: bool = False
    """Whether the model's own code draws random numbers: then the engine leaves attention to it."""
    attended: bool = False
    """Whether the model asked for attention through transformers' interface."""
    windows: tuple[set[int], set[int]] = field(default_factory=lambda: (set(), set()))
    """As of the engine's packs: those that the model asked masks for, and those that it told its attention of."""
    anchor: torch.Tensor = field(default_factory=lambda: torch.empty((), device="meta", requires_grad=True))
    entrance: Entrance | None = None
    """The last one."""

    @property
    def fused(self) -> bool:
        """Whether the adapters have kernels."""
        return self.setup.device == "cuda" and self.setup.kernels

    @property
    def working(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.setup.working)
        return dtype

    @property
    def compute(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.setup.compute)
        return dtype

    def product(self, x: torch.Tensor, out_features: int) -> torch.Tensor:
        """x W^T in the compute dtype, in the working one."""
        return _made(x.to(self.compute), (*x.shape[:-1], out_features)).to(self.working)


class Meeting:
    """Where the gradients of the layers behind one entrance meet."""

    def __init__(self, wants_input: bool) -> None:
        self.wants_input = wants_input
        self.grad_NI: torch.Tensor | None = None
        self.grads_down: list[torch.Tensor] = []


class Entrance:
    """An input that layers share: there it is kept, with one dropout mask for all of them, where masks are kept."""

    def __init__(self, now: Pass, x: torch.Tensor, siblings: tuple[Site, ...]) -> None:
        self.input = x
        self.siblings = siblings
        self.callers: list[Site] = []
        self.meeting = Meeting(x.requires_grad)
        self.x_NI: torch.Tensor
        self.frozen_NI: torch.Tensor
        """In the compute dtype."""
        adapted = any(site.name in now.adapted for site in siblings)
        self.token = _enter(x, now.anchor if adapted else None, self, now)


class Site:
    """A frozen linear layer; the weight that is made dense for it is counted elsewhere."""

    def __init__(self, name: str, out_features: int) -> None:
        self.name = name
        self.out_features = out_features
        self.siblings: tuple[Site, ...] = (self,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        now = running()
        here = now.entrance
        if here is None or here.input is not x:
            here = now.entrance = Entrance(now, x, self.siblings)
        here.callers.append(self)
        for site in here.callers:
            site.siblings = tuple(here.callers)  # known by the next pass
        needed = self.name in now.adapted or here.meeting.wants_input
        out = _linear(here.token if needed else None, self, here, now).view(*x.shape[:-1], -1)
        return out.to(x.dtype) if now.setup.device == "cpu" else out


class _Enter(torch.autograd.Function):
    """drop(x) A^T, and backwards the gradients of A and of x; A of one layer is counted with the layer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor | None, entrance: Entrance, now: Pass) -> torch.Tensor:
        x_NI = entrance.x_NI = x.reshape(-1, x.shape[-1]).to(now.working)
        ctx.meeting, ctx.shape, ctx.dtype = entrance.meeting, x.shape, x.dtype
        kept: tuple[torch.Tensor, ...] = ()
        if anchor is not None:
            masked = now.dropout and not now.fused
            kept = (x_NI, torch.empty_like(x_NI, dtype=torch.uint8)) if masked else (x_NI,)
            dropped_NI = torch.empty_like(x_NI) if masked else x_NI
            del dropped_NI
        entrance.frozen_NI = x_NI.to(now.compute)
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None, None]:
        grad_NI, ctx.meeting.grad_NI = ctx.meeting.grad_NI, None
        saved = ctx.saved_tensors
        if saved:
            x_NI, *keeps = saved
            dropped_NI = torch.empty_like(x_NI) if keeps else x_NI
            del dropped_NI
            if grad_NI is not None and keeps:
                through_NI = torch.empty_like(x_NI)
                del through_NI
        ctx.meeting.grads_down.clear()
        return None if grad_NI is None else grad_NI.view(ctx.shape).to(ctx.dtype), None, None, None


_enter: Callable[..., torch.Tensor] = _Enter.apply


class _Linear(torch.autograd.Function):
    """The frozen product, and the adapter's own."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor | None, site: Site, entrance: Entrance, now: Pass) -> torch.Tensor:
        y_NO = now.product(entrance.frozen_NI, site.out_features)
        ctx.site, ctx.now, ctx.meeting, ctx.features = site, now, entrance.meeting, entrance.x_NI.shape[-1]
        ctx.adapted = site.name in now.adapted
        if ctx.adapted:
            ctx.save_for_backward(_made(entrance.x_NI, (len(entrance.x_NI), now.rank)))
        return y_NO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None, None]:
        (grad_NO,) = grads
        site, now, meeting = ctx.site, ctx.now, ctx.meeting
        if meeting.wants_input:
            grad_NI = now.product(grad_NO, ctx.features)
            if meeting.grad_NI is None:
                meeting.grad_NI = grad_NI
        if ctx.adapted:
            (down_NR,) = ctx.saved_tensors
            meeting.grads_down.append(torch.empty_like(down_NR))
            if now.working != torch.float32 and not now.fused:
                sum_OR = grad_NO.new_empty((site.out_features, now.rank))
                del sum_OR
        return None, None, None, None


_linear: Callable[..., torch.Tensor] = _Linear.apply


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each sequence: (1, H, N, D) to (1, N, H, D)."""
    now = running()
    now.attended = True
    if sliding_window is not None:
        now.windows[1].add(sliding_window)
    dtype = query.dtype
    within = torch.float32 if now.setup.device == "cpu" else now.working
    query, key, value = query.to(within), key.to(within), value.to(within)
    groups = query.shape[1] // key.shape[1]
    wide = now.setup.device == "cpu" and query.shape[-1] != value.shape[-1]  # no kernel of torch's takes those there
    plain = not dropout and softcap is None and s_aux is None and not wide
    if groups > 1 and not (plain and now.setup.device == "cpu"):
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    shape = (now.sequences, now.length)
    q, k, v = (x[0].unflatten(1, shape).transpose(0, 1) for x in (query, key, value))
    if plain:
        out_SHLD = sdpa(q, k, v)
    elif now.draws and now.setup.device == "cpu":
        out_SHLD = _drawn(q, k, v)
    else:
        out_SHLD = _explicit(q, k, v, capped=softcap is not None, dropped=dropout > 0)
    out = torch.cat([out_SHLD.transpose(1, 2).reshape(math.prod(shape), *query.shape[1:2], -1)])[None]
    return out.to(dtype) if now.setup.device == "cpu" else out, None


def _explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, capped: bool, dropped: bool) -> torch.Tensor:
    """Attention written out, as the engine does where SDPA does not offer it."""
    scores = (q @ k.transpose(-1, -2)).float() * 1.0
    if capped:
        scores = torch.tanh(scores / 1.0) * 1.0
    weights = torch.softmax(scores.masked_fill(torch.empty_like(scores, dtype=torch.bool), 0.0), -1)
    if dropped:
        weights = weights * torch.empty_like(weights, dtype=torch.bool) * 1.0
    return weights.to(v.dtype) @ v


def _drawn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Torch's attention with dropout, for which a CPU has no kernel: q and k are scaled, and the mask is of numbers."""
    weights = torch.softmax((q * 1.0) @ (k * 1.0).transpose(-1, -2), -1)
    return (weights * torch.empty_like(weights)) @ v


class _Sdpa(torch.autograd.Function):
    """What scaled_dot_product_attention keeps: its inputs, its output and a number a row."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[-1])).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


sdpa: Callable[..., torch.Tensor] = _Sdpa.apply


def drop(x: torch.Tensor) -> torch.Tensor:
    """A dropout of the base's own: a mask in the dtype of x."""
    return x * x.new_empty(x.shape)


def head(hidden_NE: torch.Tensor) -> torch.Tensor:
    """Output head and loss without their logits: what is kept is the gradient of the hidden states."""
    out: torch.Tensor = _head(hidden_NE[torch.empty(len(hidden_NE), dtype=torch.int64, device="meta")])
    return out


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ME: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.empty_like(hidden_ME))
        return hidden_ME.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (grad_ME,) = ctx.saved_tensors
        grad: torch.Tensor = grad_ME * grads[0]
        return grad


_head: Callable[..., torch.Tensor] = _Head.apply


class _Logits(torch.autograd.Function):
    """The output head as a layer of its own; it is frozen, and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return _made(hidden, (*hidden.shape[:-1], vocabulary)).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0].new_empty(ctx.shape, dtype=ctx.dtype), None, None


_logits: Callable[..., torch.Tensor] = _Logits.apply


class Stands(TorchFunctionMode):
    """What a device does by itself and the meta device does not: mixed precision on a GPU, products of experts."""

    LOWER = (
        *(F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__),
        *(torch.bmm, torch.Tensor.bmm, torch.baddbmm, torch.Tensor.baddbmm),
    )
    FLOAT32 = (F.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax, torch.Tensor.pow, torch.pow)
    GROUPED = tuple(getattr(where, name, None) for where, name in ((F, "grouped_mm"), (torch, "_grouped_mm")))

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self._working: torch.dtype | None = getattr(torch, setup.working) if setup.device == "cuda" else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.GROUPED:
            rows, weights = args[:2]  # the meta device's own takes bfloat16 alone
            return rows @ weights[0].to(rows.dtype)
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return False  # asked whether a mask is all ones, which one of padded rows is not
        to = self._working if func in self.LOWER else torch.float32 if func in self.FLOAT32 else None
        if to is not None and self._working is not None:
            args = tuple(a.to(to) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
        return func(*args, **(kwargs or {}))


def attach(model: PreTrainedModel, tree: ModuleTree) -> None:
    """Put the mirror's layers into a model on the meta device, for good, where the engine puts its own."""
    head_module = model.get_output_embeddings()
    for layer in tree.modules:
        if layer.kind != "experts":
            site = Site(layer.name, layer.out_features)
            model.get_submodule(layer.name).forward = site.forward
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.forward = drop  # type: ignore[method-assign, assignment]
    if isinstance(head_module, nn.Linear):
        vocabulary = head_module.out_features
        head_module.forward = lambda input: _logits(input, vocabulary, running().working)  # type: ignore[method-assign]
    _set_attention(model, NAME)


def detach_attention(model: PreTrainedModel) -> None:
    """Let a model attend in its own way: not every architecture comes through transformers' interface."""
    _set_attention(model, "eager")


def _set_attention(model: PreTrainedModel, name: str) -> None:
    nested = (getattr(model.config, name) for name in model.config.sub_configs)
    for config in (model.config, *nested):
        if config is not None:
            config._attn_implementation_internal = name


_running: Pass | None = None


def running() -> Pass:
    """The pass that the model is in."""
    if _running is None:
        raise RuntimeError("no pass is running")
    return _running


@contextmanager
def run(now: Pass) -> Iterator[None]:
    """Let the model's layers know the pass, through forward and backward."""
    global _running
    _running = now
    try:
        yield
    finally:
        _running = None


def _made(x: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    return x.new_empty(shape)


def _no_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> None:
    if _running is not None and local_size:
        _running.windows[0].add(local_size)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
