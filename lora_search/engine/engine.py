"""The engine of a host: one frozen base, its resident trials, and steps that train all of them together."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from peft.functional import delete_adapter
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from lora_search.checkpoint import Checkpoint
from lora_search.data import FlatRows, TokenizedData, TokenSplit, flatten, rows_by_length
from lora_search.engine.adamw import clip_together, norms_together, step_together
from lora_search.engine.adapter import FlatAdapter, Places
from lora_search.engine.evaluate import Evaluation
from lora_search.engine.forward import Measured, PackedBase
from lora_search.engine.lanes import Lanes
from lora_search.engine.layers import AdapterPassage, DropoutSite, LinearSite, working_dtype
from lora_search.engine.metrics import Report, StepMetrics, peak_memory_bytes
from lora_search.engine.pack import Share
from lora_search.engine.random import seeded
from lora_search.engine.trial import ResidentTrial, lora_config
from lora_search.engine.trouble import in_words, is_out_of_memory, require_finite, too_large
from lora_search.errors import TrialFailed
from lora_search.memory.gauge import Gauge
from lora_search.model import FrozenBase
from lora_search.space import TrialConfig
from lora_search.targets import module_tree, resolve

logger = logging.getLogger(__name__)

EVALUATION_TOKENS = {"cpu": 2048, "cuda": 32_768}
"""Tokens of a pass without gradients, over all trials in it."""


class Engine:
    """Trains any number of trials on one base and one data set, in one forward and one backward pass.

    A trial's result depends on its configuration alone: not on the trials beside it, on what ran before it, or on
    whether it was taken out and brought back in between.
    """

    def __init__(self, base: FrozenBase, data: TokenizedData, lanes: int = 1, gauge: Gauge | None = None) -> None:
        """
        Args:
            gauge: says what fits together; without one, everything does.
            lanes: on a CPU, passes that run side by side; each has an equal share of torch's threads, always the same,
                for the last bits of a product may depend on how many threads it has.
        """
        self.base = base
        self.data = data
        self._gauge = gauge
        self._tree = module_tree(base.model)
        self._peft: PeftModel | None = None
        self._trials: dict[str, ResidentTrial] = {}
        self._untrained: dict[str, Evaluation] = {}
        self.pack_limit: int | None = None
        """Most trials that go into one pass; None until memory has run out for the first time."""
        self._evaluation_tokens = EVALUATION_TOKENS[base.device.type]
        self._lanes = Lanes(base.device, lanes)
        self._sites = self._attach_sites()
        self._places = {name: site.place for name, site in self._sites.items()}
        self._packed = PackedBase(base, data.pad_token_id)
        self._siblings = self._introduce_siblings()

    @property
    def residents(self) -> tuple[str, ...]:
        return tuple(self._trials)

    def room(self, config: TrialConfig | None = None) -> int:
        """Bytes left beside the residents, and a trial more where one is given; negative where it does not fit."""
        if self._gauge is None:
            return 0
        configs = [trial.config for trial in self._trials.values()]
        return self._gauge.room(configs if config is None else [*configs, config])

    def size(self, config: TrialConfig) -> int:
        """Bytes that a trial takes by itself, as far as is known."""
        return 0 if self._gauge is None else self._gauge.size(config)

    def admit(self, trial: str, config: TrialConfig, checkpoint: Checkpoint | None = None) -> None:
        """Make a trial resident, at its start or where a checkpoint left it.

        Raises:
            InputError: the target modules are none of this base.
            SweepError: the checkpoint is damaged.
        """
        if trial in self._trials:
            raise ValueError(f"trial {trial} is resident already")
        name = f"trial_{trial}"
        targets = resolve(self._tree, config.lora.target_modules)
        adapter = lora_config(config, targets)
        try:
            with seeded(config.training.seed, self.base.devices):
                if self._peft is None:
                    self._peft = get_peft_model(self.base.model, adapter, adapter_name=name)
                else:
                    self._peft.add_adapter(name, adapter)
            for module in self._peft.modules():
                if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
                    AdapterPassage.attach(module)
            flat = FlatAdapter(self._peft, name, self._places, self._siblings, config.scaling, working_dtype(self.base))
            experts = any(".experts" in weight for weight in (*targets.modules, *targets.parameters))
            resident = ResidentTrial(name, config, self._peft, flat, adapts_experts=experts)
            if checkpoint is not None:
                resident.restore(checkpoint)
        except BaseException:
            self._delete(name)
            raise
        self._trials[trial] = resident

    def release(self, trial: str) -> None:
        """Take a trial out; its memory is free afterwards."""
        self._delete(self._trials.pop(trial).name)

    def _delete(self, name: str) -> None:
        """Take an adapter out, also one of which PEFT has made but a part."""
        if self._peft is not None:
            self._peft.base_model.set_adapter([])  # deleting an active adapter makes PEFT warn and choose another
            self._peft.peft_config.pop(name, None)
        delete_adapter(self.base.model, name, LoraModel.prefix, LoraLayer)

    def position(self, trial: str) -> int:
        """Optimiser steps that a resident trial has done."""
        return self._trials[trial].step

    def snapshot(self, trial: str) -> Checkpoint:
        """The checkpoint of a resident trial."""
        return self._trials[trial].snapshot()

    def step(self, trials: Sequence[str]) -> dict[str, StepMetrics | TrialFailed]:
        """One optimiser step of each named trial, all in one pass where memory allows it.

        One trial's failure is its own value here, never an exception.
        """
        self.base.model.train()
        groups = self._groups(trials)
        in_turn = self._has_active_experts  # PEFT's active adapters are the same for all threads
        done = map(self._step_group, groups) if in_turn else self._lanes.map(self._step_group, groups)
        return {name: outcome for outcomes in done for name, outcome in outcomes.items()}

    def gradients(self, trials: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the next step of each named trial would follow, before clipping: a vector of its parameters' size.

        Changes nothing; for whoever wants to see that company makes no difference.
        """
        self.base.model.train()
        found: dict[str, torch.Tensor] = {}
        for names in self._groups(trials):
            group = {name: self._trials[name] for name in names}
            self._accumulate({name: trial.next_shares(self.data.train) for name, trial in group.items()})
            for name, trial in group.items():
                found[name] = trial.adapter.joined(trial.adapter.gradients)
                trial.adapter.clear_gradients()
        return found

    def _groups(self, trials: Sequence[str]) -> list[list[str]]:
        """The trials that share a pass: as many as memory allows, but a group for each lane."""
        together = [trial for trial in trials if self._shares_passes(trial)]
        size = max(1, math.ceil(len(together) / self._lanes.count))
        size = min(size, self.pack_limit or size)
        groups = [together[start : start + size] for start in range(0, len(together), size)]
        return groups + [[trial] for trial in trials if trial not in together]

    def _shares_passes(self, trial: str) -> bool:
        """Whether every weight that the trial adapts sees every token of a pack.

        The weights of experts do not: each sees the tokens that its router sends it.
        """
        return self._packed.flat and not self._trials[trial].adapts_experts

    def _step_group(self, names: list[str]) -> dict[str, StepMetrics | TrialFailed]:
        group = {name: self._trials[name] for name in names}
        start = time.perf_counter()
        try:
            shares = {name: trial.next_shares(self.data.train) for name, trial in group.items()}
            losses = self._accumulate(shares)
        except Exception as error:
            failure = in_words(error)
            memory = is_out_of_memory(error)
        else:
            return self._finish(group, shares, losses, time.perf_counter() - start)
        finally:
            for trial in group.values():
                trial.adapter.clear_gradients()
        self._free_memory()  # outside of the handler: the exception holds the failed pass's frames and their tensors
        if len(names) == 1:
            step = group[names[0]].step + 1
            return {names[0]: too_large(step, failure) if memory else TrialFailed(f"{failure} at step {step}")}
        half = (len(names) + 1) // 2
        if memory:
            self._limit(len(names), half)
        else:
            logger.warning("%s with %d trials in one pass; they are tried apart", failure, len(names))
        return self._step_group(names[:half]) | self._step_group(names[half:])

    def _limit(self, together: int, most: int) -> None:
        self.pack_limit = min(most, self.pack_limit or most)
        logger.warning("out of memory with %d trials in one pass; from now on at most %d", together, self.pack_limit)

    def _free_memory(self) -> None:
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()

    def _accumulate(self, shares: dict[str, list[Share]]) -> dict[str, float]:
        """All forward and backward passes of a step; the trials' losses."""
        self._activate(list(shares))
        losses = dict.fromkeys(shares, 0.0)
        for part in range(max(map(len, shares.values()))):
            now = {name: of_trial[part] for name, of_trial in shares.items() if part < len(of_trial)}
            pack = self._packed.pack(list(now.values()))
            for name, loss in zip(now, self._packed.train(pack), strict=True):
                losses[name] += loss
        return losses

    def _finish(
        self, group: dict[str, ResidentTrial], shares: dict[str, list[Share]], losses: dict[str, float], seconds: float
    ) -> dict[str, StepMetrics | TrialFailed]:
        """Check each trial's loss and gradient, and step its optimiser."""
        start = time.perf_counter()
        norms = dict(zip(group, norms_together([trial.adapter.gradients for trial in group.values()]), strict=True))
        tokens = {name: sum(len(share.rows.tokens_N) for share in of_trial) for name, of_trial in shares.items()}
        outcomes: dict[str, StepMetrics | TrialFailed] = {}
        for name, trial in group.items():
            try:
                require_finite("loss", losses[name], trial.step + 1)
                require_finite("gradient norm", norms[name], trial.step + 1)
            except TrialFailed as failure:
                outcomes[name] = failure
        sound = {name: trial for name, trial in group.items() if name not in outcomes}
        clip_together(
            [trial.adapter.gradients for trial in sound.values()],
            [norms[name] for name in sound],
            [trial.config.training.max_grad_norm for trial in sound.values()],
        )
        for name in self._step_optimizers(list(sound)):
            outcomes[name] = too_large(sound.pop(name).step + 1, "in its optimiser")
        for name, trial in sound.items():
            outcomes[name] = trial.stepped(losses[name], norms[name], tokens[name])
        seconds += time.perf_counter() - start
        for name, trial in group.items():
            trial.window_seconds += seconds * tokens[name] / sum(tokens.values())
        return outcomes

    def _step_optimizers(self, names: list[str]) -> list[str]:
        """Step the trials' optimisers, together where memory allows it; those for which it never does."""
        try:
            step_together([self._trials[name].optimizer for name in names])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return []
        self._free_memory()
        if len(names) == 1:
            return names
        half = (len(names) + 1) // 2
        self._limit(len(names), half)
        return self._step_optimizers(names[:half]) + self._step_optimizers(names[half:])

    def report(self, trials: Sequence[str]) -> dict[str, Report | TrialFailed]:
        """Evaluate resident trials on the validation split, together, and close their windows since the last report."""
        start = time.perf_counter()
        evaluations = self._evaluate_apart(trials)
        seconds = (time.perf_counter() - start) / max(1, len(trials))
        reports: dict[str, Report | TrialFailed] = {}
        for name, evaluation in evaluations.items():
            resident = self._trials[name]
            resident.seconds += resident.window_seconds + seconds
            try:
                if isinstance(evaluation, TrialFailed):
                    raise evaluation
                require_finite("validation loss", evaluation.loss, resident.step)
                reports[name] = self._report(resident, evaluation)
            except TrialFailed as failure:
                reports[name] = failure
            resident.window, resident.window_seconds = [], 0.0
        if self._gauge is not None:
            self._gauge.saw([trial.config for trial in self._trials.values()], peak_memory_bytes(self.base.devices))
        return reports

    def _report(self, trial: ResidentTrial, evaluation: Evaluation) -> Report:
        window, steps = trial.window, max(1, len(trial.window))
        return Report(
            step=trial.step,
            steps_total=trial.config.training.steps,
            eval_loss=evaluation.loss,
            perplexity=evaluation.perplexity,
            token_accuracy=evaluation.token_accuracy,
            train_loss=sum(metrics.loss for metrics in window) / steps,
            grad_norm=sum(metrics.grad_norm for metrics in window) / steps,
            lr=window[-1].lr if window else 0.0,
            tokens=trial.tokens,
            tokens_per_second=sum(metrics.tokens for metrics in window) / max(trial.window_seconds, 1e-9),
            seconds=trial.seconds,
            peak_memory_bytes=peak_memory_bytes(self.base.devices),
            trainable_parameters=trial.adapter.size,
            history=tuple(window),
        )

    def _evaluate_apart(self, trials: Sequence[str]) -> dict[str, Evaluation | TrialFailed]:
        """Evaluate together, and each by itself where that fails: one trial's fault is no other's."""
        try:
            return dict(self.evaluate(trials))
        except Exception as error:
            failure, memory = in_words(error), is_out_of_memory(error)
        self._free_memory()
        if len(trials) > 1:
            return {name: outcome for trial in trials for name, outcome in self._evaluate_apart([trial]).items()}
        step = self._trials[trials[0]].step
        return {trials[0]: too_large(step, failure) if memory else TrialFailed(f"{failure} at step {step}")}

    def evaluate(
        self, trials: Sequence[str], split: str = "validation", *, by_row: bool = False
    ) -> dict[str, Evaluation]:
        """Resident trials' standing on a split, measured together.

        Args:
            by_row: keep each row's loss too.
        """
        self.base.model.eval()
        found: dict[str, Evaluation] = {}
        together = [trial for trial in trials if self._shares_passes(trial)]
        for names in [together] * bool(together) + [[trial] for trial in trials if trial not in together]:
            self._activate(names)
            measured = self._measure([self._trials[name].adapter for name in names], split, by_row)
            found |= dict(zip(names, measured, strict=True))
        return {trial: found[trial] for trial in trials}

    def untrained(self, split: str = "validation") -> Evaluation:
        """The bare base's standing on a split; measured once."""
        if split not in self._untrained:
            self.base.model.eval()
            self._activate([])
            (self._untrained[split],) = self._measure([None], split, by_row=True)
        return self._untrained[split]

    def _measure(self, adapters: Sequence[FlatAdapter | None], split: str, by_row: bool) -> list[Evaluation]:
        """The standing of each adapter on a split.

        Where memory runs out, passes have fewer rows from here on, and where they have one of each, fewer adapters.
        """
        rows = {"validation": self.data.validation, "test": self.data.test}[split]
        one_row_each = len(adapters) * int(rows.lengths_N.max())
        while True:
            try:
                return self._measure_in_passes(adapters, rows, by_row)
            except (MemoryError, RuntimeError) as error:
                smallest = len(adapters) == 1 and self._evaluation_tokens < one_row_each
                if smallest or not is_out_of_memory(error):
                    raise
            self._free_memory()
            if self._evaluation_tokens < one_row_each:
                half = len(adapters) // 2
                return self._measure(adapters[:half], split, by_row) + self._measure(adapters[half:], split, by_row)
            self._evaluation_tokens //= 2
            logger.warning("out of memory in an evaluation; from now on %d tokens a pass", self._evaluation_tokens)

    def _measure_in_passes(
        self, adapters: Sequence[FlatAdapter | None], rows: TokenSplit, by_row: bool
    ) -> list[Evaluation]:
        tokens = max(1, self._evaluation_tokens // len(adapters))

        def measure(picked: list[int]) -> tuple[list[Measured], FlatRows]:
            batch = flatten(rows, picked)
            return self._packed.measure(self._packed.pack([Share(batch, a) for a in adapters])), batch

        groups = list(rows_by_length(rows, tokens))
        pieces = list(self._lanes.map(measure, groups))
        targets = sum(len(batch.targets_M) for _, batch in pieces)
        found = []
        for of_one in zip(*(piece for piece, _ in pieces), strict=True):
            loss, hits = sum(measured.loss for measured in of_one), sum(measured.hits for measured in of_one)
            evaluation = Evaluation(loss / targets, hits / targets, targets)
            if by_row:
                losses_N, targets_N = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
                for measured, picked, (_, batch) in zip(of_one, groups, pieces, strict=True):
                    losses_N[picked] = batch.sums_by_row(measured.losses_M.cpu().numpy())
                    targets_N[picked] = batch.targets_by_row
                evaluation = replace(evaluation, losses_N=losses_N, targets_N=targets_N)
            found.append(evaluation)
        return found

    @property
    def _has_active_experts(self) -> bool:
        return any(trial.adapts_experts for trial in self._trials.values())

    def _activate(self, trials: Sequence[str]) -> None:
        """Have PEFT apply what it alone can: the adapters of fused experts, of one trial at a time."""
        if self._peft is not None and self._has_active_experts:
            self._peft.base_model.set_adapter([self._trials[t].name for t in trials if self._trials[t].adapts_experts])

    def _attach_sites(self) -> dict[str, LinearSite]:
        """Have packs run through every linear layer of the base; the layers by name."""
        sites: dict[str, LinearSite] = {}
        for place, module in enumerate(self._tree.modules):
            if module.kind != "experts":
                sites[module.name] = LinearSite(place, self.base.model.get_submodule(module.name), self.base)
                sites[module.name].attach()
        dropouts = [module for module in self.base.model.modules() if isinstance(module, nn.Dropout) and module.p > 0]
        for index, dropout in enumerate(dropouts):
            DropoutSite(len(self._tree.modules) + index, dropout).attach()
        return sites

    def _introduce_siblings(self) -> list[Places]:
        """Tell every linear layer which others read its input; all layers, in groups."""
        by_place = {site.place: site for site in self._sites.values()}
        groups = self._packed.siblings()
        for group in groups:
            for place in group:
                by_place[place].siblings = group
        unseen = by_place.keys() - {place for group in groups for place in group}
        return groups + [(place,) for place in sorted(unseen)]
