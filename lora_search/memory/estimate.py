"""The bytes of a base, of a trial on it, and of a host that trains some trials together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_search.memory.split import Split, split_base
from lora_search.memory.values import (
    ALLOCATOR,
    DTYPE_BYTES,
    EVALUATED_TOGETHER,
    EVALUATION_TOKENS,
    KEPT_DENSE_BYTES,
    LOGIT_BYTES,
    LOGIT_COPIES,
    PIECE_BYTES,
    ROWS,
    RUNTIME_BYTES,
    HostBytes,
    Setup,
    TrialBytes,
    TrialShape,
    Weights,
    with_targets_of_all,
)
from lora_search.memory.weights import nf4_constants, quantised_names, weigh
from lora_search.targets import ModuleTree, Targets, module_tree, trainable_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_search.memory.corners import Crowd
    from lora_search.memory.replay import Replay

MOST_TOGETHER = 512
"""Trials on one host, where memory sets no limit."""


@dataclass(frozen=True)
class _Piece:
    """What of a base is on one GPU: all of it, or some decoder blocks."""

    gpu: int
    base: int
    """Bytes of its weights."""
    split: Split | None = None

    @property
    def span(self) -> range | None:
        return None if self.split is None else self.split.spans[self.gpu]

    def targets(self, targets: Targets) -> Targets:
        """Those of the targets that are on it."""
        if self.split is None:
            return targets
        here = [
            [n for n in names if self.split.gpu_of(n) == self.gpu] for names in (targets.modules, targets.parameters)
        ]
        return replace(targets, modules=tuple(here[0]), parameters=tuple(here[1]))


class BaseMemory:
    """Predicts bytes for one base in one setup."""

    def __init__(self, model: PreTrainedModel, setup: Setup) -> None:
        """
        Args:
            model: a skeleton (`lora_search.targets.skeleton`); it is changed for good.

        Raises:
            InputError: the base cannot be split over so many GPUs.
        """
        self.tree: ModuleTree = module_tree(model)
        self._model = model
        self._set(setup)
        self._dense, self._kept_dense = _dense(model, self.tree, setup)
        self._replay = _replay(model, self.tree, setup)

    def _set(self, setup: Setup) -> None:
        self.setup = setup
        self.weights: Weights = weigh(self._model, setup)
        self._whole = _Piece(0, self.weights.total)
        self._pieces: tuple[_Piece, ...] = (self._whole,)
        if setup.gpus > 1:
            split = split_base(self._model, setup)
            self._pieces = tuple(_Piece(gpu, base, split) for gpu, base in enumerate(split.base))

    @property
    def split(self) -> Split | None:
        """How the base lies on the GPUs, where there are several."""
        return self._pieces[0].split

    def over(self, gpus: int, gpu_bytes: int) -> BaseMemory:
        """The same base over so many GPUs that have so much to give, each.

        Raises:
            InputError: it cannot be split so.
        """
        other = copy(self)
        other._set(replace(self.setup, gpus=gpus, gpu_bytes=gpu_bytes if gpus > 1 else 0))
        return other

    @property
    def by_rule(self) -> bool:
        """Whether activations are by a rule of thumb: this architecture's code does not run on shapes alone."""
        return self._replay.by_rule

    def trial(self, shape: TrialShape) -> TrialBytes:
        """What a trial adds to its host, to all of its GPUs together."""
        return self._trial(shape, self._whole)

    def _trial(self, shape: TrialShape, piece: _Piece) -> TrialBytes:
        size = trainable_parameters(self.tree, piece.targets(shape.targets), shape.rank)
        held = self._replay.training(shape.targets, shape.rank, shape.dropout, shape.length, piece.span)
        activations, passing = held.times(shape.batch_size)
        return TrialBytes(
            trainable=size,
            adapter=size * (4 + (DTYPE_BYTES[self.setup.working] if self.setup.working != "float32" else 0)),
            gradient=4 * size,
            optimizer=8 * size,
            activations=activations,
            passing=passing,
        )

    def host(self, shapes: Sequence[TrialShape], passing: Sequence[TrialShape] | None = None) -> HostBytes:
        """A host that trains these trials together; of one with several GPUs, the fullest.

        Args:
            passing: those of them that are in a pass at once, the others being resident alone; None for all.

        All rows of a pass count as if their adapters stood wherever one of them stands: a layer that one trial adapts
        keeps its input for all of them.
        """
        passing = shapes if passing is None else passing
        return max((self._host(shapes, passing, piece) for piece in self._pieces), key=lambda host: host.total)

    def _host(self, residents: Sequence[TrialShape], passing: Sequence[TrialShape], piece: _Piece) -> HostBytes:
        state = sum(self._trial(shape, piece).state * count for shape, count in Counter(residents).items())
        hosts = [self._at_work(state, shapes, piece) for shapes in self._at_once(passing)]
        return max(hosts, key=lambda host: host.work)

    def _at_once(self, shapes: Sequence[TrialShape]) -> list[Sequence[TrialShape]]:
        """Which of these trials are in passes at the same time, where that may take most: all, but those that the
        engine trains one by one."""
        alone = [shape for shape in shapes if not self.shares_passes(shape)]
        if not alone:
            return [shapes]
        in_turn = any(_adapts_experts(shape) or self._replay.passes(shape.length).in_turn for shape in shapes)
        trials = {shape: self._trial(shape, self._whole) for shape in set(alone)}
        alone.sort(key=lambda shape: trials[shape].activations + trials[shape].passing)
        together = [shape for shape in shapes if self.shares_passes(shape)]
        return [alone[-1 if in_turn else -self.setup.lanes :], *([together] if together else [])]

    def shares_passes(self, shape: TrialShape) -> bool:
        """As the engine has it."""
        return not _adapts_experts(shape) and self._replay.passes(shape.length).shared

    def _at_work(self, state: int, shapes: Sequence[TrialShape], piece: _Piece) -> HostBytes:
        """A host whose residents take so much, with these trials in a pass, or each in one of its own."""
        shared = all(map(self.shares_passes, shapes))
        counts = Counter(with_targets_of_all(shapes) if shared else shapes)
        trials = {shape: self._trial(shape, piece) for shape in counts}
        lanes = max(1, min(self.setup.lanes, len(shapes)))
        rows = ROWS if shared and self.setup.device == "cpu" else 1
        tokens = sum(math.ceil(shape.tokens / rows) * rows * count for shape, count in counts.items())
        kept = tokens * max((trial.activations / shape.tokens for shape, trial in trials.items()), default=0.0)
        passing = tokens * max((trial.passing / shape.tokens for shape, trial in trials.items()), default=0.0)
        alone = self.setup.device == "cpu"  # there a trial's targets go through the output head by themselves
        targets = max((shape.tokens for shape in shapes), default=0) if alone else tokens
        logits = lanes * self._logits(targets) if piece.gpu == 0 else 0  # where the output head is
        back = passing + lanes * self._dense  # the logits have gone when the first gradient comes
        measured = shapes if shared else shapes[-1:]
        return HostBytes(
            runtime=RUNTIME_BYTES if self.setup.device == "cpu" else 0,
            base=piece.base + self._kept_dense,
            trials=state,
            activations=math.ceil(kept),
            passing=math.ceil(back) if back >= logits else 0,
            logits=logits if logits > back else 0,
            evaluation=self._evaluation(measured, piece),
            allocator=ALLOCATOR[self.setup.device],
        )

    def together(self, trial: TrialShape | Crowd, capacity: int) -> int:
        """How many trials of one shape, or of a crowd, fit into `capacity` bytes."""
        fits, too_many = 0, MOST_TOGETHER + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            taken = self.host([trial] * middle).total if isinstance(trial, TrialShape) else trial.total(middle, self)
            if taken <= capacity:
                fits = middle
            else:
                too_many = middle
        return fits

    def _logits(self, targets: int) -> int:
        """Bytes of the output head at work on so many targets at once, in turns.

        Logits that the engine leaves to the model's code are the replay's, with what their tokens hold.
        """
        if not self._replay.in_turns:
            return self.weights.head_copy
        return LOGIT_COPIES * self._logits_at_once(targets) + self.weights.head_copy

    def _logits_at_once(self, targets: int) -> int:
        return min(LOGIT_BYTES[self.setup.device], 4 * targets * self.weights.vocabulary)

    def _evaluated_logits(self, targets: int) -> int:
        """The same without a gradient: on a CPU the head's product stays as it is but for some of its rows."""
        if self.setup.device != "cpu" or not self._replay.in_turns:
            return self._logits(targets)
        product = self._logits_at_once(targets) * DTYPE_BYTES[self.setup.compute] // DTYPE_BYTES["float32"]
        piece = min(self._logits_at_once(targets), max(PIECE_BYTES, 4 * ROWS * self.weights.vocabulary))
        copies = LOGIT_COPIES - (self.setup.compute == "float32")  # then they are the product's own
        return product + copies * piece + self.weights.head_copy

    def _evaluation(self, shapes: Sequence[TrialShape], piece: _Piece) -> int:
        length = max((shape.length for shape in shapes), default=1)
        in_a_pass = EVALUATED_TOGETHER[self.setup.device]
        together = max(1, min(in_a_pass, len(shapes)))
        of_one = max(EVALUATION_TOKENS[self.setup.device] // in_a_pass, length)
        lanes = self.setup.lanes
        if self.setup.validation_tokens is not None:
            of_one = min(of_one, self.setup.validation_tokens)
            lanes = max(1, min(lanes, -(-len(shapes) // together) * -(-self.setup.validation_tokens // max(1, of_one))))
        tokens = together * of_one
        held = self._replay.evaluation(length)
        logits = self._evaluated_logits(of_one if self.setup.device == "cpu" else tokens) if piece.gpu == 0 else 0
        before_head = held.kept if self._replay.in_turns else held.peak
        most = max(held.peak * tokens / length, before_head * tokens / length + logits)
        return math.ceil(lanes * (most + self._dense))


def _adapts_experts(shape: TrialShape) -> bool:
    """Whether weights are adapted that see but the tokens that their router sends them."""
    return any(".experts" in name for name in (*shape.targets.modules, *shape.targets.parameters))


def _replay(model: PreTrainedModel, tree: ModuleTree, setup: Setup) -> Replay:
    from lora_search.memory.replay import Replay

    return Replay(model, tree, setup)


def _dense(model: PreTrainedModel, tree: ModuleTree, setup: Setup) -> tuple[int, int]:
    """Bytes of quantised weights as products need them: of the largest, with its scales in float32, while a product is
    made; of all that the engine keeps so. Those that PEFT cannot adapt are left to bitsandbytes, which keeps none."""
    if not setup.quantised:
        return 0, 0
    sizes = {name: model.get_submodule(name).weight.numel() for name in quantised_names(model)}
    sites = {module.name for module in tree.modules}
    whole = sum(size for name, size in sizes.items() if name in sites) * DTYPE_BYTES[setup.compute]
    keeps = setup.device == "cpu" and whole <= KEPT_DENSE_BYTES
    largest = max((size for name, size in sizes.items() if not (keeps and name in sites)), default=0)
    return largest * DTYPE_BYTES[setup.compute] + 4 * nf4_constants(largest), whole if keeps else 0
