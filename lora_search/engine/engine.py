"""The engine of a host: one frozen base, its resident trials, and steps that train all of them together."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence

import torch
from peft import PeftModel, get_peft_model
from peft.functional import delete_adapter
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper

from lora_search.checkpoint import Checkpoint
from lora_search.data import TokenizedData
from lora_search.engine.adapter import FlatAdapter
from lora_search.engine.evaluate import Evaluation
from lora_search.engine.finish import finish
from lora_search.engine.forward import PackedBase
from lora_search.engine.lanes import Lanes
from lora_search.engine.layers import AdapterPassage
from lora_search.engine.measure import Measure
from lora_search.engine.metrics import Report, StepMetrics, peak_memory_bytes
from lora_search.engine.pack import Share
from lora_search.engine.products import working_dtype
from lora_search.engine.random import seeded
from lora_search.engine.sites import attach_sites, introduce_siblings
from lora_search.engine.trial import ResidentTrial, lora_config
from lora_search.engine.trouble import Failure, Trouble, device_fails_host, free_memory, require_finite, trouble_of
from lora_search.errors import HostFailed, SweepError, TrialFailed
from lora_search.machine import keep_heaps
from lora_search.memory.gauge import Gauge
from lora_search.model import FrozenBase
from lora_search.positions import longest_decides
from lora_search.space import TrialConfig
from lora_search.targets import module_tree, resolve

logger = logging.getLogger(__name__)


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
        if base.device.type == "cpu":
            keep_heaps()
        self.base = base
        self.data = data
        self._gauge = gauge
        self._tree = module_tree(base.model)
        self._peft: PeftModel | None = None
        self._trials: dict[str, ResidentTrial] = {}
        self._untrained: dict[str, Evaluation] = {}
        self._modes_differ = True
        """Whether some modules may be in training mode and others not, as those of a new adapter."""
        self.pack_limit: int | None = None
        """Most trials that go into one pass; None until memory has run out for the first time."""
        self._sent_away = False
        """Whether this step, or report, has told a trial already that there is too little memory for all residents."""
        self._judging = threading.Lock()
        self._passes: list[list[str]] = []
        """The passes of this step that came through."""
        self._passed: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[list[TrialConfig], list[TrialConfig]]] = {}
        """Since the gauge was told last: who was resident, and who of them was in a pass at once."""
        self._lanes = Lanes(base.device, lanes)
        sites = attach_sites(base, self._tree)
        self._places = {name: site.place for name, site in sites.items()}
        self._packed = PackedBase(base, data.pad_token_id)
        self._siblings = introduce_siblings(sites.values(), self._packed.siblings())
        self._longest_decides = longest_decides(base.model, data.longest)
        """Whether the base's own code keeps what the rows of a pass decide, for all threads."""
        self._packed.flat &= not (self._longest_decides or self._packed.hides_window(data.longest))
        self._measure = Measure(self._packed, self._lanes, data)

    @property
    def residents(self) -> tuple[str, ...]:
        return tuple(self._trials)

    def room(self, *more: TrialConfig) -> int:
        """Bytes left beside the residents, and trials more where any are given; negative where they do not fit."""
        if self._gauge is None:
            return 0
        return self._gauge.room([*(trial.config for trial in self._trials.values()), *more])

    def size(self, config: TrialConfig) -> int:
        """Bytes that a trial takes by itself, as far as is known."""
        return 0 if self._gauge is None else self._gauge.size(config)

    def fits(self, config: TrialConfig) -> bool:
        """Whether a trial would fit with no other beside it, as far as is known."""
        return self._gauge is None or self._gauge.room([config]) >= 0

    def together(self) -> int:
        """How many of the largest trials of the space fit at once.

        Raises:
            ValueError: there is no gauge to tell.
        """
        if self._gauge is None:
            raise ValueError("nobody has reckoned what fits together")
        return self._gauge.together()

    def ever(self) -> int | None:
        """How many trials might fit at once, were all as small as the space allows; None where nobody has reckoned."""
        return None if self._gauge is None else self._gauge.ever()

    @device_fails_host()
    def admit(self, trial: str, config: TrialConfig, checkpoint: Checkpoint | None = None) -> None:
        """Make a trial resident, at its start or where a checkpoint left it.

        Raises:
            InputError: the target modules are none of this base.
            SweepError: the checkpoint is damaged.
            TrialFailed: there is no memory for it, or PEFT cannot make such an adapter.
            HostFailed: the device computes no longer.
        """
        if trial in self._trials:
            raise ValueError(f"trial {trial} is resident already")
        self._modes_differ = True
        name = f"trial_{trial}"
        targets = resolve(self._tree, config.lora.target_modules)
        adapter = lora_config(config, targets)
        try:
            with seeded(config.training.seed, self.base.devices):
                if self._peft is None:
                    self._peft = get_peft_model(self.base.model, adapter, adapter_name=name)
                    self.base.model.disable_input_require_grads()  # PEFT's; see `load_base`
                else:
                    self._peft.add_adapter(name, adapter)
                    self._look_at(name)
            for module in self._peft.modules():
                if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
                    AdapterPassage.attach(module)
            flat = FlatAdapter(self._peft, name, self._places, self._siblings, config.scaling, working_dtype(self.base))
            experts = any(".experts" in weight for weight in (*targets.modules, *targets.parameters))
            resident = ResidentTrial(name, config, self._peft, flat, adapts_experts=experts)
            if checkpoint is not None:
                resident.restore(checkpoint)
        except BaseException as error:
            self._delete(name)
            if isinstance(error, SweepError) or not isinstance(error, Exception):
                raise
            raise trouble_of(error).failure(0) from error
        self._trials[trial] = resident

    def release(self, trial: str) -> None:
        """Take a trial out; its memory is free afterwards."""
        self._delete(self._trials.pop(trial).name)

    def _delete(self, name: str) -> None:
        """Take an adapter out, also one of which PEFT has made but a part."""
        if self._peft is not None:
            self._peft.base_model.set_adapter([])  # deleting an active adapter makes PEFT warn and choose another
            self._peft.peft_config.pop(name, None)
            self._look_at(next(iter(self._peft.peft_config), name))
        delete_adapter(self.base.model, name, LoraModel.prefix, LoraLayer)

    def _look_at(self, name: str) -> None:
        """Have PEFT ask this adapter, one that is there, of what kind all are, as it does to restore a mixture's."""
        assert self._peft is not None
        self._peft.active_adapter = name

    def position(self, trial: str) -> int:
        """Optimiser steps that a resident trial has done."""
        return self._trials[trial].step

    @device_fails_host()
    def snapshot(self, trial: str) -> Checkpoint:
        """The checkpoint of a resident trial.

        Raises:
            HostFailed: the device computes no longer.
        """
        return self._trials[trial].snapshot()

    def step(self, trials: Sequence[str]) -> dict[str, StepMetrics | Failure]:
        """One optimiser step of each named trial, all in one pass where memory allows it.

        One trial's failure is its own value here, never an exception. Where memory is short even for one in a pass, and
        more are resident, one is told HostFailed, and is to be released; others that find none make no step, and have
        no outcome.
        """
        self._sent_away = False
        self._set_training(True)
        groups = self._groups(trials)
        done = self._lanes.map(self._step_group, groups)
        found = {name: outcome for outcomes in done for name, outcome in outcomes.items()}
        self._note(1 if self._lanes.in_turn else self._lanes.count)
        return found

    def _note(self, at_once: int) -> None:
        """Note by which passes the gauge is to explain a peak: of those that trials share, the largest at once."""
        passes, self._passes = self._passes, []
        if self._gauge is None or not passes:
            return

        def size(names: list[str]) -> tuple[int, list[str]]:
            """In rows; by the names among equals, for lanes end in any order."""
            return sum(self._trials[name].config.training.batch_size for name in names), names

        shared = sorted((names for names in passes if self._shares_passes(names[0])), key=size)[-at_once:]
        alone = [names for names in passes if not self._shares_passes(names[0])]
        counted = {name for names in (*shared, *alone) for name in names}
        who = self.residents, tuple(name for name in self.residents if name in counted)
        if who not in self._passed:
            residents, passing = ([self._trials[name].config for name in names] for names in who)
            self._passed[who] = residents, passing

    def gradients(self, trials: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the next step of each named trial would follow, before clipping: a vector of its parameters' size.

        Changes nothing; for whoever wants to see that company makes no difference.
        """
        self._set_training(True)
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

    def _step_group(self, names: list[str]) -> dict[str, StepMetrics | Failure]:
        group = {name: self._trials[name] for name in names}
        start = time.perf_counter()
        try:
            shares = {name: trial.next_shares(self.data.train) for name, trial in group.items()}
            losses = self._accumulate(shares)
        except Exception as error:
            trouble = trouble_of(error)
        else:
            self._passes.append(names)
            return finish(group, shares, losses, time.perf_counter() - start, self._limit, self._judge)
        finally:
            for trial in group.values():
                trial.adapter.clear_gradients()
        free_memory(self.base.device)
        if len(names) == 1:
            return dict(self._judge(names[0], trouble, group[names[0]].step + 1))
        half = (len(names) + 1) // 2
        if trouble.memory:
            self._limit(len(names), half)
        else:
            logger.warning("%s with %d trials in one pass; they are tried apart", trouble.words, len(names))
        return self._step_group(names[:half]) | self._step_group(names[half:])

    def _limit(self, together: int, most: int, where: str = "in one pass") -> None:
        self.pack_limit = min(most, self.pack_limit or most)
        logger.warning("out of memory with %d trials %s; from now on at most %d", together, where, self.pack_limit)

    def _judge(self, trial: str, trouble: Trouble, step: int) -> dict[str, Failure]:
        """What becomes of a trial that had trouble by itself: where memory is short, the company may be to blame."""
        residents = len(self._trials)
        if not trouble.memory or residents == 1:
            return {trial: trouble.failure(step)}
        with self._judging:
            if self._sent_away:  # what that one holds may be enough
                return {}
            self._sent_away = True
        self._limit(residents, residents - 1, "resident")
        return {trial: trouble.of_company(step, residents)}

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

    def report(self, trials: Sequence[str]) -> dict[str, Report | Failure]:
        """Evaluate resident trials on the validation split, together, and close their windows.

        Where memory is short, it is as in a step.
        """
        self._sent_away = False
        start = time.perf_counter()
        evaluations = self._evaluate_apart(trials)
        seconds = (time.perf_counter() - start) / max(1, len(trials))
        reports: dict[str, Report | Failure] = {}
        for name, evaluation in evaluations.items():
            resident = self._trials[name]
            resident.evaluated(seconds)
            try:
                if isinstance(evaluation, TrialFailed | HostFailed):
                    raise evaluation
                require_finite("validation loss", evaluation.loss, resident.step)
                reports[name] = resident.report(
                    evaluation,
                    peak_memory_bytes=peak_memory_bytes(self.base.devices),
                    trial_memory_bytes=None if self._gauge is None else self._gauge.trial_bytes(resident.config),
                )
            except (TrialFailed, HostFailed) as failure:
                reports[name] = failure
        if self._gauge is not None:
            peak = peak_memory_bytes(self.base.devices)
            for residents, passing in self._passed.values():
                self._gauge.saw(residents, peak, passing)
            self._passed.clear()
        return reports

    def _evaluate_apart(self, trials: Sequence[str]) -> dict[str, Evaluation | Failure]:
        """Evaluate together, and each by itself where that fails: one trial's fault is no other's."""
        try:
            return dict(self.evaluate(trials))
        except Exception as error:
            trouble = trouble_of(error)
        free_memory(self.base.device)
        if len(trials) > 1:
            return {name: outcome for trial in trials for name, outcome in self._evaluate_apart([trial]).items()}
        return dict(self._judge(trials[0], trouble, self._trials[trials[0]].step))

    def evaluate(
        self, trials: Sequence[str], split: str = "validation", *, by_row: bool = False
    ) -> dict[str, Evaluation]:
        """Resident trials' standing on a split, measured together.

        Args:
            by_row: keep each row's loss too.
        """
        self._set_training(False)
        found: dict[str, Evaluation] = {}
        together = [trial for trial in trials if self._shares_passes(trial)]
        for names in [together] * bool(together) + [[trial] for trial in trials if trial not in together]:
            self._activate(names)
            measured = self._measure.split([self._trials[name].adapter for name in names], split, by_row)
            found |= dict(zip(names, measured, strict=True))
        return {trial: found[trial] for trial in trials}

    def untrained(self, split: str = "validation") -> Evaluation:
        """The bare base's standing on a split; measured once."""
        if split not in self._untrained:
            self._set_training(False)
            self._activate([])
            (self._untrained[split],) = self._measure.split([None], split, by_row=True)
        return self._untrained[split]

    def _set_training(self, training: bool) -> None:
        """Where they are in it already nothing is done: with many adapters they are thousands."""
        own = self._longest_decides or self._packed.draws
        self._lanes.in_turn = own or self._has_active_experts  # PEFT's are the same for all threads
        if self._modes_differ or self.base.model.training is not training:
            self.base.model.train(training)
            self._modes_differ = False

    @property
    def _has_active_experts(self) -> bool:
        return any(trial.adapts_experts for trial in self._trials.values())

    def _activate(self, trials: Sequence[str]) -> None:
        """Have PEFT apply what it alone can: the adapters of fused experts, of one trial at a time."""
        if self._peft is not None and self._has_active_experts:
            self._peft.base_model.set_adapter([self._trials[t].name for t in trials if self._trials[t].adapts_experts])
