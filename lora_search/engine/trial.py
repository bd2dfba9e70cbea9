"""A resident trial: one adapter, its optimiser and schedule, its place in the data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from transformers import get_scheduler

from lora_search.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, OPTIMIZER, TRIAL, Checkpoint, seal, verify
from lora_search.data import TokenSplit, flatten, training_rows
from lora_search.engine.adapter import FlatAdapter
from lora_search.engine.evaluate import Evaluation
from lora_search.engine.masks import Masks
from lora_search.engine.metrics import Report, StepMetrics
from lora_search.engine.pack import Share
from lora_search.errors import TrialFailed
from lora_search.space import TrialConfig
from lora_search.targets import Targets

if TYPE_CHECKING:
    from peft import PeftModel

FORMAT = 3
"""Version of the checkpoint's layout."""


def lora_config(config: TrialConfig, targets: Targets) -> LoraConfig:
    """PEFT's configuration of a trial's adapter."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora.rank,
        lora_alpha=config.alpha,  # PEFT says int and takes any number
        lora_dropout=config.lora.dropout,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        use_rslora=config.lora.use_rslora,
        bias="none",
    )


class ResidentTrial:
    """The state of one trial on a host; its adapter is already part of `model` under `name`."""

    def __init__(
        self, name: str, config: TrialConfig, model: PeftModel, adapter: FlatAdapter, *, adapts_experts: bool = False
    ) -> None:
        self.name = name
        self.config = config
        self.adapter = adapter
        self.adapts_experts = adapts_experts
        """Whether some of its weights see only the tokens that a router sends them."""
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.window: list[StepMetrics] = []
        """Steps since the last report, or those that it was of, where none has been taken since."""
        self.window_seconds = 0.0
        """This trial's share, by tokens, of the time that its packs took for them."""
        self.told = False
        """Whether the window has been reported. It stays until the next step: whoever was to keep the report may be
        lost, and asks again, of a checkpoint."""
        self._model = model
        training = config.training
        self.optimizer = torch.optim.AdamW(
            adapter.vectors,
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay,
        )
        self._schedule = get_scheduler(
            training.lr_schedule,
            self.optimizer,
            num_warmup_steps=math.ceil(training.steps * training.warmup_ratio),
            num_training_steps=training.steps,
        )
        # The schedule warns where nobody has called the optimiser's own step; ours is `adamw.step_together`.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]

    @property
    def rows_read(self) -> int:
        """The position in the data: rows that the steps so far have read."""
        return self.step * self.rows_per_step

    @property
    def rows_per_step(self) -> int:
        return self.config.training.batch_size * self.config.training.gradient_accumulation_steps

    def next_shares(self, split: TokenSplit) -> list[Share]:
        """What the next step brings to a pack, a share for each of its forward passes."""
        training = self.config.training
        rows = training_rows(len(split), training.seed, self.rows_read, self.rows_per_step)
        batches = [
            flatten(split, rows[start : start + training.batch_size])
            for start in range(0, len(rows), training.batch_size)
        ]
        # The mean is over the target tokens of the whole effective batch, not a mean of the batches' means
        # (huggingface/transformers#34191).
        weight = 1 / sum(len(batch.targets_M) for batch in batches)
        return [
            Share(batch, self.adapter, Masks(training.seed, self.step, part, self.config.lora.dropout), weight)
            for part, batch in enumerate(batches)
        ]

    def stepped(self, loss: float, grad_norm: float, tokens: int) -> StepMetrics:
        """The optimiser has taken a step: move the schedule on, and note what the step was."""
        if self.told:
            self.window, self.window_seconds, self.told = [], 0.0, False
        lr = float(self._schedule.get_last_lr()[0])
        self._schedule.step()
        self.adapter.refresh()
        self.step += 1
        self.tokens += tokens
        metrics = StepMetrics(self.step, loss, grad_norm, lr, tokens)
        self.window.append(metrics)
        return metrics

    def evaluated(self, seconds: float) -> None:
        """It was evaluated, which took so long of its time: the window is closed, and its time counted, once."""
        self.seconds += seconds + (0.0 if self.told else self.window_seconds)
        self.told = True

    def report(self, evaluation: Evaluation, *, peak_memory_bytes: int, trial_memory_bytes: int | None) -> Report:
        """Its report of the window."""
        window, steps = self.window, max(1, len(self.window))
        return Report(
            step=self.step,
            steps_total=self.config.training.steps,
            eval_loss=evaluation.loss,
            perplexity=evaluation.perplexity,
            token_accuracy=evaluation.token_accuracy,
            train_loss=sum(metrics.loss for metrics in window) / steps,
            grad_norm=sum(metrics.grad_norm for metrics in window) / steps,
            lr=window[-1].lr if window else 0.0,
            tokens=self.tokens,
            tokens_per_second=sum(metrics.tokens for metrics in window) / max(self.window_seconds, 1e-9),
            seconds=self.seconds,
            peak_memory_bytes=peak_memory_bytes,
            trial_memory_bytes=trial_memory_bytes,
            trainable_parameters=self.adapter.size,
            history=tuple(window),
        )

    def snapshot(self) -> Checkpoint:
        """Everything that the rest of the trial follows from."""
        schedule = {key: value for key, value in self._schedule.state_dict().items() if key != "lr_lambdas"}
        adapter = get_peft_model_state_dict(
            self._model, state_dict=dict(self.adapter.parameters), adapter_name=self.name, save_embedding_layers=False
        )
        return seal(
            {
                ADAPTER_CONFIG: _config_json(self._model.peft_config[self.name]),
                ADAPTER_WEIGHTS: save_tensors(_on_cpu(adapter), metadata={"format": "pt"}),
                OPTIMIZER: save_tensors(_on_cpu(self._moments())),
            },
            {
                "format": FORMAT,
                "step": self.step,
                "rows_read": self.rows_read,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "schedule": schedule,
                "window": [asdict(metrics) for metrics in self.window],
                "window_seconds": self.window_seconds,
                "told": self.told,
            },
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become the trial that `snapshot` was taken of; going on from here is, to the bit, what it would have done.

        Raises:
            SweepError: it is damaged.
            TrialFailed: it is of another version.
        """
        verify(checkpoint, needed=(ADAPTER_WEIGHTS, OPTIMIZER))
        state = json.loads(checkpoint[TRIAL])
        if state.get("format") != FORMAT:
            raise TrialFailed(f"checkpoint: found format {state.get('format')!r}; allowed: {FORMAT}")
        device = self.adapter.vectors[0].device
        set_peft_model_state_dict(
            self._model,
            {key: tensor.to(device) for key, tensor in load_tensors(checkpoint[ADAPTER_WEIGHTS]).items()},
            self.name,
        )
        self.adapter.refresh()
        self._restore_moments(load_tensors(checkpoint[OPTIMIZER]))
        # The lambdas are functions of the configuration, made anew with the schedule.
        groups: Sequence[dict[str, Any]] = self.optimizer.param_groups
        self._schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None] * len(groups)})
        for group, lr in zip(groups, self._schedule.get_last_lr(), strict=True):
            group["lr"] = lr
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.window = [StepMetrics(**metrics) for metrics in state["window"]]
        self.window_seconds = state["window_seconds"]
        self.told = state.get("told", False)  # checkpoints of 0.1.0 have none: their windows were emptied when told

    def _moments(self) -> dict[str, torch.Tensor]:
        """The optimiser's state as that of one parameter, whatever devices it is on; empty before the first step."""
        states = [self.optimizer.state[vector] for vector in self.adapter.vectors if vector in self.optimizer.state]
        if not states:
            return {}
        names = [name for name in states[0] if name != "step"]
        moments = {name: self.adapter.joined([state[name] for state in states]) for name in names}
        return {"step": states[0]["step"], **moments}

    def _restore_moments(self, moments: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in moments.items():
            vectors = self.adapter.vectors
            parts = [tensor.clone() for _ in vectors] if name == "step" else self.adapter.parted(tensor)
            for vector, part in zip(vectors, parts, strict=True):
                self.optimizer.state[vector][name] = part


def _config_json(config: LoraConfig) -> bytes:
    """As `PeftConfig.save_pretrained` writes it, for use rather than for more training."""
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(fields | {"inference_mode": True}, indent=2, sort_keys=True).encode()


def _on_cpu(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
