"""The engine of a host: one frozen base, its resident trials, one step at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F

from lora_search.checkpoint import Checkpoint
from lora_search.data import TokenizedData, collate, training_rows
from lora_search.engine.evaluate import Evaluation, evaluate, target_logits
from lora_search.engine.metrics import Report, StepMetrics, peak_memory_bytes
from lora_search.engine.random import RandomStream
from lora_search.engine.trial import ResidentTrial, lora_config
from lora_search.errors import TrialFailed
from lora_search.model import FrozenBase
from lora_search.space import TrialConfig
from lora_search.targets import module_tree, resolve


class Engine:
    """Trains any number of trials on one base and one data set.

    A trial's result depends on its configuration alone: not on the trials beside it, on what ran before it, or on
    whether it was taken out and brought back in between.
    """

    def __init__(self, base: FrozenBase, data: TokenizedData) -> None:
        self.base = base
        self.data = data
        self._tree = module_tree(base.model)
        self._peft: PeftModel | None = None
        self._trials: dict[str, ResidentTrial] = {}
        self._active: str | None = None

    @property
    def residents(self) -> tuple[str, ...]:
        return tuple(self._trials)

    def admit(self, trial: str, config: TrialConfig, checkpoint: Checkpoint | None = None) -> None:
        """Make a trial resident, at its start or where a checkpoint left it.

        Raises:
            InputError: the target modules are none of this base.
            SweepError: the checkpoint is damaged.
        """
        if trial in self._trials:
            raise ValueError(f"trial {trial} is resident already")
        name = f"trial_{trial}"
        adapter = lora_config(config, resolve(self._tree, config.lora.target_modules))
        random = RandomStream(config.training.seed, self.base.device)
        with random.active():
            if self._peft is None:
                self._peft = get_peft_model(self.base.model, adapter, adapter_name=name)
            else:
                self._peft.add_adapter(name, adapter)
        resident = ResidentTrial(name, config, self._peft, random)
        if checkpoint is not None:
            try:
                resident.restore(checkpoint)
            except BaseException:
                self._peft.delete_adapter(name)
                raise
        self._trials[trial] = resident
        self._active = None

    def release(self, trial: str) -> None:
        """Take a trial out; its memory is free afterwards."""
        resident = self._trials.pop(trial)
        assert self._peft is not None
        self._peft.base_model.set_adapter([])  # deleting an active adapter makes PEFT warn and choose another
        self._peft.delete_adapter(resident.name)
        self._active = None

    def position(self, trial: str) -> int:
        """Optimiser steps that a resident trial has done."""
        return self._trials[trial].step

    def snapshot(self, trial: str) -> Checkpoint:
        """The checkpoint of a resident trial."""
        return self._trials[trial].snapshot()

    def step(self, trials: Sequence[str]) -> dict[str, StepMetrics | TrialFailed]:
        """One optimiser step of each named trial; one trial's failure is its own value here, never an exception."""
        return {trial: self._attempt_step(self._trials[trial]) for trial in trials}

    def _attempt_step(self, trial: ResidentTrial) -> StepMetrics | TrialFailed:
        start = time.perf_counter()
        try:
            metrics = self._train_step(trial)
        except torch.OutOfMemoryError as error:
            return TrialFailed(f"out of memory at step {trial.step + 1}: {str(error).splitlines()[0]}")
        except TrialFailed as failure:
            return failure
        finally:
            trial.optimizer.zero_grad(set_to_none=True)
            trial.window_seconds += time.perf_counter() - start
        trial.window.append(metrics)
        trial.tokens += metrics.tokens
        return metrics

    def _train_step(self, trial: ResidentTrial) -> StepMetrics:
        training = trial.config.training
        rows = training_rows(len(self.data.train), training.seed, trial.rows_read, trial.rows_per_step)
        batches = [
            collate(self.data.train, rows[start : start + training.batch_size], self.data.pad_token_id)
            for start in range(0, len(rows), training.batch_size)
        ]
        # The mean is over the target tokens of the whole effective batch, not a mean of the batches' means
        # (huggingface/transformers#34191).
        targets = sum(batch.targets for batch in batches)
        self._activate(trial)
        self.base.model.train()
        loss = 0.0
        with trial.random.active():
            for batch in batches:
                logits_MV, targets_M = target_logits(self.base, batch.to(self.base.device))
                share = F.cross_entropy(logits_MV, targets_M, reduction="sum") / targets
                torch.autograd.backward(share)
                loss += share.item()
        _require_finite("loss", loss, trial.step + 1)
        limit = training.max_grad_norm or math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(list(trial.parameters.values()), limit))
        _require_finite("gradient norm", grad_norm, trial.step + 1)
        lr = float(trial.schedule.get_last_lr()[0])
        trial.optimizer.step()
        trial.schedule.step()
        trial.step += 1
        return StepMetrics(trial.step, loss, grad_norm, lr, sum(batch.tokens for batch in batches))

    def report(self, trial: str) -> Report:
        """Evaluate a resident trial on the validation split, and close the window since its last report.

        Raises:
            TrialFailed: the validation loss is not finite.
        """
        resident = self._trials[trial]
        start = time.perf_counter()
        evaluation = self.evaluate(trial)
        _require_finite("validation loss", evaluation.loss, resident.step)
        window, training_seconds = resident.window, resident.window_seconds
        resident.seconds += training_seconds + time.perf_counter() - start
        resident.window, resident.window_seconds = [], 0.0
        steps = max(1, len(window))
        return Report(
            step=resident.step,
            steps_total=resident.config.training.steps,
            eval_loss=evaluation.loss,
            perplexity=evaluation.perplexity,
            token_accuracy=evaluation.token_accuracy,
            train_loss=sum(metrics.loss for metrics in window) / steps,
            grad_norm=sum(metrics.grad_norm for metrics in window) / steps,
            lr=window[-1].lr if window else 0.0,
            tokens=resident.tokens,
            tokens_per_second=sum(metrics.tokens for metrics in window) / max(training_seconds, 1e-9),
            seconds=resident.seconds,
            peak_memory_bytes=peak_memory_bytes(self.base.device),
            trainable_parameters=resident.trainable_parameters,
            history=tuple(window),
        )

    def evaluate(self, trial: str | None, split: str = "validation") -> Evaluation:
        """A resident trial's loss on a split, or the untrained base's where `trial` is None."""
        rows = {"validation": self.data.validation, "test": self.data.test}[split]
        if trial is not None:
            self._activate(self._trials[trial])
            return evaluate(self.base, rows, self.data.pad_token_id)
        if self._peft is None or not self._trials:
            return evaluate(self.base, rows, self.data.pad_token_id)
        self._peft.base_model.disable_adapter_layers()
        try:
            return evaluate(self.base, rows, self.data.pad_token_id)
        finally:
            self._peft.base_model.enable_adapter_layers()
            self._active = None

    def _activate(self, trial: ResidentTrial) -> None:
        if self._active != trial.name:
            assert self._peft is not None
            self._peft.set_adapter(trial.name)
            self._active = trial.name


def _require_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise TrialFailed(f"{what} is {value} at step {step}")
