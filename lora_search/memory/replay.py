"""A pass of the engine replayed on shapes alone: what it keeps, and the most that is there at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lora_search.logits import find_bend
from lora_search.memory.live import Draws, LiveBytes
from lora_search.memory.mirror import Pass, Stands, attach, detach_attention, head, run
from lora_search.memory.split import decoder_blocks
from lora_search.memory.values import Setup
from lora_search.positions import keeps_state, longest_decides
from lora_search.targets import ModuleTree, Targets, experts_per_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE = 8
"""Tokens by which a model shows what it does with its logits."""

UNWILLING = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)
"""Whatever an architecture's code says of tensors without values, or where it insists on a device."""

EXPERT_DIMENSIONS = 3
"""Of a weight that holds a layer's experts, as transformers 5 keeps them: experts, out-features, in-features."""

RULE = 40
"""Numbers that a layer keeps of each token, for each of its hidden features, where nothing better is known: a Llama
with dropout on all of its linear layers keeps 30."""


@dataclass(frozen=True)
class Held:
    """Bytes of a pass for each of its sequences; the base's weights and logits are not among them."""

    kept: float
    """When the forward pass has come to the output head."""
    peak: float
    """At the worst moment of forward and backward."""
    kept_once: float = 0.0
    """However many sequences there are, besides: experts' fused weights with their adapters in them."""
    peak_once: float = 0.0

    def times(self, sequences: int) -> tuple[int, int]:
        """Bytes of a pass of so many sequences: kept, and what comes and goes above that."""
        kept = math.ceil(self.kept_once + self.kept * sequences)
        return kept, max(0, math.ceil(self.peak_once + self.peak * sequences) - kept)


@dataclass(frozen=True)
class Passes:
    """What a base's own code lets trials do."""

    shared: bool
    """Whether they share passes, as flat sequences that stay apart; taken for granted where nothing runs here."""
    in_turn: bool
    """Whether no pass is beside another, as they share what that code keeps or draws."""


class Replay:
    """A model on the meta device that runs the engine's passes."""

    def __init__(self, model: PreTrainedModel, tree: ModuleTree, setup: Setup) -> None:
        """
        Args:
            model: a skeleton; it is changed for good.
            tree: the model's.
        """
        self.setup = setup
        self._model = model.float() if setup.quantised else model.to(getattr(torch, setup.compute))
        self._model.requires_grad_(False).train()
        self._model.config.use_cache = False
        attach(self._model, tree)
        self._known = [*self._model.parameters(), *self._model.buffers()]
        blocks = decoder_blocks(self._model)
        self._fused = {
            f"{name}.{key}": (module, key)
            for name, module in self._model.named_modules()
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == EXPERT_DIMENSIONS
        }
        """Experts' weights in one parameter, by its name in the whole model."""
        self._blocks = "" if blocks is None else blocks[0]
        self._layers = None if blocks is None else blocks[1]
        self._flat = True
        self._keeps_state = keeps_state(self._model)
        self._draws = False
        """Whether the model's own code draws random numbers as it trains."""
        self._windows: set[int] = set()
        """Those that the model has in masks alone."""
        self._passes: dict[int, Passes] = {}
        self._acquainted: set[int] = set()
        """Decoder blocks whose layers know with which others they share their input."""
        self._found: dict[tuple[frozenset[str], int, int, bool, int, range | None, bool], Held] = {}
        self.by_rule = False
        """Whether the architecture cannot be run on shapes alone, and a rule of thumb stands in."""
        if setup.checkpointing and self._model.supports_gradient_checkpointing:
            options = {
                "use_reentrant": False,
                "preserve_rng_state": False,
                "context_fn": lambda: (nullcontext(), Stands(setup)),
            }
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            self._model.disable_input_require_grads()

    def training(self, targets: Targets, rank: int, dropout: bool, length: int, span: range | None = None) -> Held:
        """Forward and backward of one adapter on these targets.

        Args:
            span: the decoder blocks on one of several GPUs, whose share this is; None for all on one.
        """
        now = Pass(self.setup, 1, length, rank, dropout, frozenset((*targets.modules, *targets.parameters)))
        one = self._remembered(now, span, backward=True)
        if not targets.parameters:
            return one
        if self.by_rule:
            here = [name for name in targets.parameters if span is None or _block(self._blocks, name) in span]
            made = [weight.numel() * weight.element_size() for weight in map(self._weight, here)]
            kept = 0 if self.setup.checkpointing else sum(made)
            return Held(one.kept, one.peak, kept, kept + 2 * max(made, default=0))
        two = self._remembered(replace(now, sequences=2), span, backward=True)
        once = 2 * one.kept - two.kept, 2 * one.peak - two.peak
        return Held(two.kept - one.kept, two.peak - one.peak, *once)

    def evaluation(self, length: int) -> Held:
        """A forward pass without gradients; layers give what they hold to the next, on whatever GPU."""
        return self._remembered(Pass(self.setup, 1, length, 0, False, frozenset()), None, backward=False)

    def passes(self, longest: int) -> Passes:
        """How the engine has trials in passes, where the longest row has so many tokens."""
        if longest not in self._passes:
            self.evaluation(PROBE)
            in_turn = self._draws or longest_decides(self._model, longest)
            own = in_turn or longest > min(self._windows, default=longest)
            self._passes[longest] = Passes(self.by_rule or (self._flat and not own), in_turn)
        return self._passes[longest]

    @cached_property
    def in_turns(self) -> bool:
        """Whether the engine takes logits in turns, within its head and loss, or leaves them to the model's code."""
        output_head = self._model.get_output_embeddings()
        if output_head is None:
            return True
        if self._model.base_model is self._model:  # there are no hidden states to be had, as of Llama 4
            return False
        now = Pass(replace(self.setup, device="cpu"), 1, PROBE, 0, False, frozenset())  # in float32: casts are nothing
        try:
            with run(now), Stands(now.setup), torch.no_grad():
                self._hidden(now)
                return find_bend(output_head, lambda: self._run(now, (1, PROBE), self._model)) is not None
        except UNWILLING:
            return True

    def _remembered(self, now: Pass, span: range | None, *, backward: bool) -> Held:
        reached = backward and span is not None and self._is_reached(now.adapted, span)
        key = (now.adapted, now.sequences, now.rank, now.dropout, now.length, span, backward)
        if key not in self._found:
            try:
                with self._cut_to(span, reached=reached):
                    self._found[key] = self._at_full_depth(
                        now.adapted, span, lambda: self._held(now, backward=backward)
                    )
            except UNWILLING:
                if span is not None:
                    self._found[key] = self._share(now, span, backward=backward)
                else:
                    self.by_rule = True
                    self._found[key] = _rule_of_thumb(self._model, now, backward=backward)
        return self._found[key]

    def _share(self, now: Pass, span: range, *, backward: bool) -> Held:
        """A part, by the blocks, of what the whole model holds: where these do not run without the others."""
        whole = self._remembered(now, None, backward=backward)
        kept = whole.kept * len(span) / len(self._layers or ())
        return Held(kept, kept + whole.peak - whole.kept)

    @contextmanager
    def _cut_to(self, span: range | None, *, reached: bool) -> Iterator[None]:
        """Leave those blocks alone in the model.

        Args:
            reached: a gradient goes through them to blocks before them.
        """
        if span is None or self._layers is None:
            yield
            return
        whole = list(self._layers)
        hooks = [self._model.get_input_embeddings().register_forward_hook(_wants_gradient)] if reached else []
        _cut(self._layers, [whole[index] for index in span])
        try:
            yield
        finally:
            _cut(self._layers, whole)
            for hook in hooks:
                hook.remove()

    def _is_reached(self, modules: Collection[str], span: range) -> bool:
        """Whether a block before these, or what stands before all of them, is adapted."""
        return any(index is None or index < span.start for index in map(partial(_block, self._blocks), modules))

    def _at_full_depth(self, modules: Collection[str], span: range | None, held: Callable[[], Held]) -> Held:
        """Measure some layers of like ones, and go on from there."""
        layers = self._layers
        period = None if layers is None else _period(self._model, layers, modules, span)
        if layers is None or period is None:
            return held()
        few = period + len(layers) % period
        if few == period:  # the first holds less than those after it: nothing before it asks for a gradient
            few += period
        if few + period >= len(layers):
            return held()
        whole = list(layers)
        found = []
        for depth in (few, few + period):
            _cut(layers, whole[:depth])
            try:
                found.append(held())
            finally:
                _cut(layers, whole)
        first, second = found
        more = (len(whole) - few - period) // period
        return Held(
            second.kept + more * (second.kept - first.kept),
            second.peak + more * (second.peak - first.peak),
        )

    def _held(self, now: Pass, *, backward: bool) -> Held:
        blocks = set(map(id, self._layers or ()))
        if not blocks or not blocks <= self._acquainted:
            with run(now), Draws() as draws, Stands(self.setup), torch.no_grad():
                self._hidden(now)  # in which layers learn with which others they share their input
            asked, told = now.windows
            self._windows |= asked - told
            self._draws |= draws.seen
            self._acquainted |= blocks
        now.draws = self._draws
        with self._counted(now, backward) as live:
            hidden = self._hidden(now)
            forward = live.peak
            live.restart()
            total = head(hidden)
            del hidden
            at_head = live.peak
            if total.requires_grad:
                torch.autograd.backward(total)
            held = Held(at_head, max(forward, live.peak))
        return held if self.in_turns else Held(at_head, max(held.peak, self._peak_with_logits(now, backward)))

    @contextmanager
    def _counted(self, now: Pass, backward: bool) -> Iterator[LiveBytes]:
        """Run a pass, and count its bytes."""
        with (
            run(now),
            self._experts_adapted(now),
            LiveBytes(self._known) as live,
            Stands(self.setup),
            torch.set_grad_enabled(backward),
        ):
            yield live

    def _peak_with_logits(self, now: Pass, backward: bool) -> int:
        """The most at once where the model's own code makes all logits of a pass, and autograd keeps what it needs."""
        with self._counted(now, backward) as live:
            shape = (1, now.sequences * now.length) if self._flat else (now.sequences, now.length)
            targets_N = torch.empty(now.sequences * now.length, dtype=torch.int64, device="meta")
            losses_N = F.cross_entropy(  # as in the engine, nobody but autograd holds the logits
                self._run(now, shape, self._model).flatten(0, 1)[targets_N].float(), targets_N, reduction="none"
            )
            total = losses_N.sum()
            if total.requires_grad:
                torch.autograd.backward(total)
            peak: int = live.peak
            return peak

    def _weight(self, name: str) -> torch.Tensor:
        module, key = self._fused[name]
        weight: torch.Tensor = getattr(module, key)
        return weight

    @contextmanager
    def _experts_adapted(self, now: Pass) -> Iterator[None]:
        """Put adapters into the experts' fused weights, as PEFT does for each pass: W + B A is another W."""
        adapted = [self._fused[name] for name in sorted(now.adapted & self._fused.keys())]
        for module, key in adapted:
            parametrize.register_parametrization(module, key, _Adapted(now.anchor))
            module.parametrizations[key].original.requires_grad_(False)
            module.forward = parametrize.cached()(type(module).forward.__get__(module))
        try:
            yield
        finally:
            for module, key in adapted:
                vars(module).pop("forward", None)
                parametrize.remove_parametrizations(module, key, leave_parametrized=False)

    def _hidden(self, now: Pass) -> torch.Tensor:
        """The last hidden states of all tokens, flat where the architecture can."""
        if self._flat:
            try:
                hidden = self._run(now, (1, now.sequences * now.length))
            except UNWILLING:
                self._flat = False
            else:
                self._flat = now.attended and not self._keeps_state
                if self._flat:
                    return hidden.flatten(0, 1)
            detach_attention(self._model)
        return self._run(now, (now.sequences, now.length)).flatten(0, 1)

    def _run(self, now: Pass, shape: tuple[int, int], model: nn.Module | None = None) -> torch.Tensor:
        """What a model says first, in this shape: its logits, or its base's hidden states."""
        ids = torch.empty(shape, dtype=torch.int64, device="meta")
        # With a mask, transformers does not look for packed sequences, which nobody finds on the meta device.
        inputs = {"attention_mask": ids, **({"position_ids": ids} if self._flat else {})}
        out: torch.Tensor = (model or self._model.base_model)(input_ids=ids, **inputs, use_cache=False)[0]
        return out


class _Adapted(nn.Module):
    """W + B A, of which A and B are counted elsewhere."""

    def __init__(self, anchor: torch.Tensor) -> None:
        super().__init__()
        self._anchor = anchor

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self._anchor.to(weight.dtype)


def _rule_of_thumb(model: PreTrainedModel, now: Pass, *, backward: bool) -> Held:
    """Bytes from depth and width alone; each expert that a token is sent to adds half a layer."""
    text = model.config.get_text_config()
    layers, hidden = int(text.num_hidden_layers), int(text.hidden_size)
    experts = experts_per_token(text)
    layer = RULE * now.working.itemsize * hidden * now.length * (1 + experts) / 2
    if not backward:
        return Held(0.0, layer)
    kept = layers * 4 * hidden * now.length + layer if now.setup.checkpointing else layers * layer
    return Held(kept, kept + layer / 2)


def _period(model: PreTrainedModel, layers: nn.ModuleList, modules: Collection[str], span: range | None) -> int | None:
    """After how many layers the same come again: of the same kind and shapes, adapted in the same parts.

    1 where all are alike, as in Llama, 2 in Gemma 2, whose layers look back far and near in turns; None where nothing
    comes again in time, or where some blocks of several kinds are taken alone, as code that counts kinds goes astray.
    """
    (prefix,) = (name for name, module in model.named_modules() if module is layers)
    first = 0 if span is None else span.start
    adapted: list[set[str]] = [set() for _ in layers]
    for name in modules:
        index = _block(prefix, name)
        if index is not None and 0 <= index - first < len(layers):
            adapted[index - first].add(name.removeprefix(f"{prefix}.{index}."))
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    shapes = [[(name, tuple(p.shape)) for name, p in layer.named_parameters()] for layer in layers]
    if span is not None and len(set(kinds)) > 1:
        return None
    looks = list(zip(kinds, shapes, adapted, strict=False))
    for period in range(1, len(looks) // 2):
        if looks[period:] == looks[:-period]:
            return period
    return None


def _block(blocks: str, name: str) -> int | None:
    """The number of the block that a module is in; None outside of them."""
    if not name.startswith(f"{blocks}."):
        return None
    return int(name.removeprefix(f"{blocks}.").partition(".")[0])


def _wants_gradient(module: nn.Module, args: object, hidden: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        hidden.requires_grad_(True)


def _cut(layers: nn.ModuleList, to: Sequence[nn.Module]) -> None:
    layers._modules = {str(index): layer for index, layer in enumerate(to)}
