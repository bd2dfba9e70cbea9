"""Attention over a pack: each sequence attends to itself alone, at its true length.

Transformers' attention interface calls us where a model would call SDPA, with all sequences end to end. Neighbours of
one length go through one call of `scaled_dot_product_attention`; nothing is copied and nothing is padded.

Legend: H heads, N tokens of the pack, S sequences of L tokens, D features of a head.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lora_search.engine.masks import survivors_scale
from lora_search.engine.pack import Pack, running

NAME = "lora_search_packed"

PLACES = 1 << 20
"""Attention's dropout masks are numbered from here on, behind all linear layers."""


class PackedAttention:
    """Makes a model's attention ours while packs run, on however many threads.

    cuDNN's kernels, which torch prefers on Hopper, are left out meanwhile: they are prepared anew for every number of
    sequences and every length (pytorch/pytorch#155958), 22 ms each time and more for the gradient
    (analysis/benchmarks/NOTES.md), and of real rows those hardly ever come again. Torch's own (flash,
    memory-efficient) take any.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        nested = (getattr(model.config, name) for name in model.config.sub_configs)
        self._configs = [config for config in (model.config, *nested) if config is not None]
        self._before = [config._attn_implementation for config in self._configs]
        self._users = 0
        self._cudnn = True
        self._lock = threading.Lock()

    @contextmanager
    def on(self) -> Iterator[None]:
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            if not self._users:
                self._cudnn = torch.backends.cuda.cudnn_sdp_enabled()
            self._users += change
            torch.backends.cuda.enable_cudnn_sdp(self._cudnn and not self._users)
            for config, before in zip(self._configs, self._before, strict=True):
                config._attn_implementation_internal = NAME if self._users else before


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
    """Causal attention within each sequence of the running pack.

    Args:
        query: (1, H, N, D); keys and values may have fewer heads, each shared by a group.
        attention_mask: not looked at; the pack knows its sequences.
        sliding_window: positions that a token sees, itself included.
        softcap: scores are softcap * tanh(score / softcap) (Gemma 2).
        s_aux: a score for each head that takes a share of the softmax and gives nothing (attention sinks).

    Returns:
        (1, N, H, D), and no weights.
    """
    pack = running()
    assert pack is not None
    assert pack.flat
    if sliding_window is not None:
        pack.windows[1].add(sliding_window)
    dtype = query.dtype
    plain = not dropout and softcap is None and s_aux is None
    shared = plain and query.device.type == "cpu"
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    if query.device.type == "cpu" and dtype != torch.float32:
        # Half precision has no fast backward kernel on a CPU: 50 ms against 26 (analysis/benchmarks/NOTES.md).
        query, key, value = query.float(), key.float(), value.float()
    if groups > 1 and not shared:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    keeps = _keeps(pack, module, heads, dropout, query.device) if dropout else None
    sizes = [max(count, 1) * length for count, length in pack.runs]
    pieces = zip(*(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True)
    outs = []
    for (count, length), piece in zip(pack.runs, pieces, strict=True):
        if not count:
            outs.append(query.new_zeros(length, heads, piece[2].shape[-1]))
            continue
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in piece)
        window = _window(length, sliding_window, query.device)
        if plain:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=window, is_causal=window is None, scale=scale, enable_gqa=shared and groups > 1
            )
        else:
            keep = next(keeps).view(count, heads, length, length) if keeps is not None else None
            out = _explicit(q, k, v, scale, window, softcap, s_aux, keep, dropout)
        outs.append(out.transpose(1, 2).reshape(count * length, heads, -1))
    return torch.cat(outs)[None].to(dtype), None


def _window(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """True where a token may look, for a window shorter than the sequence; None where causality says it all."""
    if sliding_window is None or length <= sliding_window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - sliding_window)


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: torch.Tensor | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Attention written out, for what SDPA does not offer. All of shape (S, H, L, D)."""
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length = q.shape[-2]
    seen = window if window is not None else torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    if keep is not None:
        weights = weights * keep * survivors_scale(dropout)
    return weights.to(v.dtype) @ v


def _keeps(pack: Pack, module: nn.Module, heads: int, dropout: float, device: torch.device) -> Iterator[torch.Tensor]:
    """Each run's dropout mask, put together from the masks of the trials whose sequences it holds."""
    place = PLACES + int(getattr(module, "layer_idx", 0) or 0)
    sequences: list[torch.Tensor] = []
    for part in pack.parts:
        lengths = part.share.rows.lengths
        sizes = [heads * length * length for length in lengths]
        if part.share.masks is None:
            drawn = torch.ones(sum(sizes), dtype=torch.bool, device=device)
        else:
            drawn = part.share.masks.keep(place, (sum(sizes),), device, dropout)
        sequences += drawn.split(sizes)
    index = 0
    for count, _ in pack.runs:
        if not count:
            continue
        yield torch.stack(sequences[index : index + count])
        index += count


def _no_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> None:
    """None: the pack knows its sequences. A window is noted, of which attention itself has to be told."""
    pack = running()
    if pack is not None and local_size:
        pack.windows[0].add(local_size)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
