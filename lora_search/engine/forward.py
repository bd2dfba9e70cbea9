"""Run a base over a pack, down to each target's loss.

Legend: N tokens of the pack, M targets, V vocabulary, E features of a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lora_search.data import FlatRows
from lora_search.engine.adapter import Places
from lora_search.engine.attention import PackedAttention
from lora_search.engine.pack import Pack, Share, build_pack, build_padded, run
from lora_search.engine.products import multiplied, pieces, product, working_dtype
from lora_search.engine.random import seeded
from lora_search.engine.trouble import device_fails_host
from lora_search.errors import InputError
from lora_search.logits import Bend, find_bend
from lora_search.memory.live import Draws
from lora_search.memory.values import ROWS
from lora_search.model import FrozenBase
from lora_search.positions import keeps_state

PROBE_LENGTHS = (7, 12, 7, 3)
"""Sequences by which a base shows whether it keeps flat ones apart."""

UNABLE = (TypeError, ValueError, RuntimeError, IndexError, AssertionError, AttributeError)
"""What an architecture's code raises where it cannot be run in some way."""

LOGIT_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""Float32 logits that are held at once; more targets go through the output head in turns."""


@dataclass(frozen=True)
class Measured:
    """A share's standing on its rows."""

    loss: float
    """Summed over its targets, in nats."""
    hits: int
    """Targets that were the most likely token."""
    losses_M: torch.Tensor
    """Nats of each target."""


class PackedBase:
    """A base that runs packs.

    What an architecture can do is found out once, by trying: whether flat sequences stay apart in it (not where its
    attention goes past transformers' interface, or where it has a recurrent state), whether its logits are the output
    head's product, scaled and capped as the model does it (otherwise they are left to the model's code), and whether
    its code draws numbers as it trains, as OPT's dropout and PhiMoE's router do: then a trial has a pass of its own,
    with a stream of its own.
    """

    def __init__(self, base: FrozenBase, pad_token_id: int) -> None:
        self.base = base
        self.working = working_dtype(base)
        self._pad_token_id = pad_token_id
        self._attention = PackedAttention(base.model)
        self._head = base.model.get_output_embeddings()
        self._decoder = base.model.base_model if base.model.base_model is not base.model else None
        self.flat = True
        self.draws = False
        """Whether it draws from torch's own generators, which all threads share."""
        self._hidden_window: int | None = None
        """The shortest window that the base has in masks alone, which flat sequences have none of."""
        self.bend: Bend | None = None
        """What the model makes of the output head's product; None where its logits are made by its own code."""
        self._find_out()

    def pack(self, shares: list[Share]) -> Pack:
        """The shares as this base can run them; of a base that is not flat, one at a time."""
        if self.flat:
            return build_pack(shares, self.base.device, ROWS if self.base.device.type == "cpu" else 1)
        (share,) = shares
        return build_padded(share, self._pad_token_id, self.base.device)

    def train(self, pack: Pack) -> list[float]:
        """Each part's objective, the weighted sum of its targets' losses, with its gradient added to its adapter."""
        with self._drawing(pack), self._running(pack):
            if self.bend is not None:
                total, losses_M = _head_loss(self._hidden_ME(pack), self, pack)
            else:
                losses_M = F.cross_entropy(self._logits_MV(pack), pack.targets_M, reduction="none") * pack.weights_M
                total = losses_M.sum()
            if total.requires_grad:
                torch.autograd.backward(total)
        return pack.per_part(losses_M.detach())

    @torch.no_grad()
    def measure(self, pack: Pack) -> list[Measured]:
        """Each part's standing."""
        losses, hits = [], []
        with self._running(pack):
            for logits_mV, rows in self._logits_in_turns(pack):
                targets_m = pack.targets_M[rows]
                losses.append(F.cross_entropy(logits_mV, targets_m, reduction="none"))
                hits.append((logits_mV.max(-1).indices == targets_m).float())  # argmax is three times as slow on a CPU
                del logits_mV  # the next turn's take their place
        losses_M = torch.cat(losses)
        sums = zip(pack.parts, pack.per_part(losses_M), pack.per_part(torch.cat(hits)), strict=True)
        return [Measured(loss, round(hit), losses_M[part.targets]) for part, loss, hit in sums]

    def head_logits(self, hidden_ME: torch.Tensor, weight_VE: torch.Tensor, bend: Bend) -> torch.Tensor:
        """The model's float32 logits, the output head's product in the compute dtype."""
        return self._bent(multiplied(hidden_ME, weight_VE), bend)

    def _bent(self, product_MV: torch.Tensor, bend: Bend) -> torch.Tensor:
        logits_MV = product_MV.float()
        if self._head.bias is not None:
            logits_MV.add_(self._head.bias)
        return bend.bend_(logits_MV)

    def head_weight(self) -> torch.Tensor:
        weight: torch.Tensor = self._head.weight.to(self.base.compute_dtype)
        return weight

    def turns(self, pack: Pack) -> Iterator[slice]:
        """Targets that go through the output head together; on a CPU, as in the layers, of one trial alone."""
        size = max(1, LOGIT_BYTES[self.base.device.type] // (4 * self._head.weight.shape[0]))
        size = size // ROWS * ROWS or size  # as many as a product needs no more rows for
        stretches = [part.targets for part in pack.parts]
        if self.base.device.type != "cpu":
            stretches = [slice(0, stretches[-1].stop)]
        for stretch in stretches:
            for start in range(stretch.start, stretch.stop, size):
                yield slice(start, min(start + size, stretch.stop))

    def _logits_in_turns(self, pack: Pack) -> Iterator[tuple[torch.Tensor, slice]]:
        if self.bend is None:
            yield self._logits_MV(pack), slice(0, len(pack.targets_M))
            return
        hidden_ME, weight_VE = self._hidden_ME(pack), self.head_weight()
        for rows in self.turns(pack):
            if self.base.device.type != "cpu":
                yield self.head_logits(hidden_ME[rows], weight_VE, self.bend), rows
                continue
            product_mV = multiplied(hidden_ME[rows], weight_VE)
            for piece in pieces(rows, len(weight_VE)):
                yield self._bent(product_mV[piece.start - rows.start : piece.stop - rows.start], self.bend), piece
            del product_mV  # the next turn's takes its place

    def _hidden_ME(self, pack: Pack) -> torch.Tensor:
        """The last hidden states from which the targets are predicted."""
        assert self._decoder is not None
        hidden: torch.Tensor = self._decoder(**pack.inputs, use_cache=False)[0]
        return hidden.reshape(-1, hidden.shape[-1])[pack.predictors_M]

    def _logits_MV(self, pack: Pack) -> torch.Tensor:
        logits = self._all_logits(pack)
        return logits.reshape(-1, logits.shape[-1])[pack.predictors_M].float()

    def _all_logits(self, pack: Pack) -> torch.Tensor:
        logits: torch.Tensor = self.base.model(**pack.inputs, use_cache=False).logits
        return logits

    @contextmanager
    def _drawing(self, pack: Pack) -> Iterator[None]:
        """Let what the base draws be the trial's own, of this pass."""
        if not self.draws:
            yield
            return
        (part,) = pack.parts
        with seeded(part.share.masks.key if part.share.masks is not None else 0, self.base.devices):
            yield

    @contextmanager
    def _running(self, pack: Pack) -> Iterator[None]:
        attention = self._attention.on() if pack.flat else nullcontext()
        # Mixed precision on a CPU is the layers' own business: only their products are in half precision.
        autocast = self.base.autocast if self.base.device.type != "cpu" else nullcontext()
        with run(pack), attention, autocast:
            yield

    def hides_window(self, longest: int) -> bool:
        """Whether rows of so many tokens go beyond a window of which the base does not tell its attention.

        Qwen2-MoE, PhiMoE and Llama 4's chunks are so. To be asked once `siblings` has been.
        """
        return self._hidden_window is not None and longest > self._hidden_window

    @torch.no_grad()
    def siblings(self) -> list[Places]:
        """The linear layers in the order in which they are run, those together that read the same input."""
        rows = Share(_probe_rows(self._head.weight.shape[0]), None)
        pack = self.pack([rows])
        pack.visits = []
        with self._running(pack):
            self._logits_MV(pack)
        asked, told = pack.windows
        self._hidden_window = min(asked - told, default=None)
        groups: list[tuple[torch.Tensor, list[int]]] = []
        seen: set[int] = set()
        for x, place in pack.visits:
            if place in seen:
                continue
            seen.add(place)
            if groups and groups[-1][0] is x:
                groups[-1][1].append(place)
            else:
                groups.append((x, [place]))
        return [tuple(places) for _, places in groups]

    @torch.no_grad()
    def _find_out(self) -> None:
        """Compare each way of running the base with what it says of a padded batch."""
        self.base.model.eval()
        rows = _probe_rows(self._head.weight.shape[0])
        padded = build_padded(Share(rows, None), self._pad_token_id, self.base.device)
        native = self._natively(padded)
        flat = build_pack([Share(rows, None)], self.base.device)
        bend = self._find_bend(padded)
        ways = () if keeps_state(self.base.model) else (bend, None)
        for found in ways:
            if self._agrees(native, self._probe(flat, found)) and not self._finds_draws(flat, found):
                self.flat, self.bend = True, found
                return
        self.flat = False
        self.draws = self._finds_draws(padded, None)
        if self._agrees(native, self._probe(padded, bend)):
            self.bend = bend

    def _finds_draws(self, pack: Pack, bend: Bend | None) -> bool:
        """Whether the base draws numbers as it trains, or says something else when the generators stand elsewhere.

        By more than where they stand alike: sums of many threads differ on a GPU. Few of PhiMoE's draws decide
        anything, and none of them may in a probe.
        """
        said = []
        self.base.model.train()
        with Draws() as draws:
            for seed in (0, 0, 1):
                with seeded(seed, self.base.devices):
                    said.append(self._probe(pack, bend))
        self.base.model.eval()
        if draws.seen:
            return True
        first, again, other = said
        if first is None or again is None or other is None:  # it does not run so
            return False
        return bool((other - first).abs().max() > 4 * (again - first).abs().max())

    def _natively(self, pack: Pack) -> torch.Tensor:
        try:
            with self._running(pack), device_fails_host():
                return self._logits_MV(pack)
        except torch.OutOfMemoryError:
            raise
        except UNABLE as error:
            reason, name = str(error).partition("\n")[0], type(self.base.model).__name__
            if self.base.quantized:
                raise InputError(
                    f"base.quantization: {name}'s own code does not run on nf4 weights ({reason}); none may do"
                ) from error
            raise InputError(f"base.model: {name} does not run: {reason}") from error

    def _find_bend(self, pack: Pack) -> Bend | None:
        if self._decoder is None or not isinstance(self._head, nn.Linear):
            return None
        with self._running(pack):
            return find_bend(self._head, lambda: self._all_logits(pack))

    def _probe(self, pack: Pack, bend: Bend | None) -> torch.Tensor | None:
        """The probe's logits by this bend, or by the model's code; None where the architecture has no such way."""
        try:
            with self._running(pack), device_fails_host():
                if bend is not None:
                    return self.head_logits(self._hidden_ME(pack), self.head_weight(), bend)
                return self._logits_MV(pack)
        except torch.OutOfMemoryError:
            raise
        except UNABLE:
            return None

    def _agrees(self, native: torch.Tensor, other: torch.Tensor | None) -> bool:
        tolerance = 1e-4 if self.base.compute_dtype == torch.float32 else 3e-2
        return other is not None and bool((native - other).abs().mean() <= tolerance * native.std())


class _HeadLoss(torch.autograd.Function):
    """Output head and cross-entropy in one, some targets at a time, so that the logits are never all there at once.

    The head is frozen: the gradient of the hidden states follows from the logits at hand, and they can go.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ME: torch.Tensor, base: PackedBase, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        weight_VE, bend = base.head_weight(), base.bend
        assert bend is not None
        losses_M = torch.empty_like(pack.weights_M)
        grad_ME = torch.empty_like(hidden_ME)
        for rows in base.turns(pack):
            logits_mV = base.head_logits(hidden_ME[rows], weight_VE, bend)
            targets_m1, weights_m1 = pack.targets_M[rows, None], pack.weights_M[rows, None]
            norms_m1 = torch.logsumexp(logits_mV, -1, keepdim=True)
            losses_M[rows] = ((norms_m1 - logits_mV.gather(1, targets_m1)) * weights_m1)[:, 0]
            shares_mV = (logits_mV.sub_(norms_m1) if bend.cap is None else logits_mV - norms_m1).exp_()
            shares_mV.scatter_add_(1, targets_m1, torch.full_like(norms_m1, -1.0)).mul_(weights_m1 * bend.scale)
            if bend.cap is not None:
                shares_mV.mul_(bend.damping_(logits_mV))
            del logits_mV  # what the product copies takes their place
            grad_ME[rows] = product(shares_mV.to(base.working), weight_VE.t()).to(grad_ME.dtype)
            del shares_mV  # the next turn's logits take their place
        ctx.save_for_backward(grad_ME)
        ctx.mark_non_differentiable(losses_M)
        return losses_M.sum(), losses_M

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_ME,) = ctx.saved_tensors
        return grad_ME * grads[0].to(grad_ME.dtype), None, None


_head_loss: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _HeadLoss.apply


def _probe_rows(vocabulary: int) -> FlatRows:
    """Random tokens in sequences of some lengths, every token a target of the one before it."""
    lengths = np.array(PROBE_LENGTHS)
    starts = np.cumsum(lengths) - lengths
    tokens = np.random.default_rng(0).integers(0, vocabulary, lengths.sum())
    targets = np.setdiff1d(np.arange(lengths.sum()), starts)
    positions = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    return FlatRows(tokens, positions, PROBE_LENGTHS, targets - 1, tokens[targets])
