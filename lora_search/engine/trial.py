"""A resident trial: one adapter, its optimiser and schedule, its stream of random numbers, its place in the data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from transformers import get_scheduler

from lora_search.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, OPTIMIZER, TRIAL, Checkpoint, seal, verify
from lora_search.engine.metrics import StepMetrics
from lora_search.engine.random import RandomStream
from lora_search.space import TrialConfig
from lora_search.targets import Targets

if TYPE_CHECKING:
    from peft import PeftModel

FORMAT = 1
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

    def __init__(self, name: str, config: TrialConfig, model: PeftModel, random: RandomStream) -> None:
        self.name = name
        self.config = config
        self.random = random
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.window: list[StepMetrics] = []
        """Steps since the last report."""
        self.window_seconds = 0.0
        self._model = model
        self.parameters = {
            key: parameter for key, parameter in model.named_parameters() if f".{name}." in key or key.endswith(name)
        }
        training = config.training
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay,
        )
        self.schedule = get_scheduler(
            training.lr_schedule,
            self.optimizer,
            num_warmup_steps=math.ceil(training.steps * training.warmup_ratio),
            num_training_steps=training.steps,
        )

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    def snapshot(self) -> Checkpoint:
        """Everything that the rest of the trial follows from."""
        state_of = self.optimizer.state
        optimizer = {
            f"{key}/{field}": tensor
            for key, parameter in self.parameters.items()
            for field, tensor in state_of.get(parameter, {}).items()
        }
        random = {f"random/{generator}": state for generator, state in self.random.state.items()}
        schedule = {key: value for key, value in self.schedule.state_dict().items() if key != "lr_lambdas"}
        adapter = get_peft_model_state_dict(
            self._model, state_dict=dict(self.parameters), adapter_name=self.name, save_embedding_layers=False
        )
        return seal(
            {
                ADAPTER_CONFIG: _config_json(self._model.peft_config[self.name]),
                ADAPTER_WEIGHTS: save_tensors(_on_cpu(adapter), metadata={"format": "pt"}),
                OPTIMIZER: save_tensors(_on_cpu(optimizer | random)),
            },
            {
                "format": FORMAT,
                "step": self.step,
                "rows_read": self.rows_read,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "schedule": schedule,
            },
        )

    @property
    def rows_read(self) -> int:
        """The position in the data: rows that the steps so far have read."""
        return self.step * self.rows_per_step

    @property
    def rows_per_step(self) -> int:
        return self.config.training.batch_size * self.config.training.gradient_accumulation_steps

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become the trial that `snapshot` was taken of; going on from here is, to the bit, what it would have done."""
        verify(checkpoint)
        state = json.loads(checkpoint[TRIAL])
        device = next(iter(self.parameters.values())).device
        set_peft_model_state_dict(
            self._model, {k: t.to(device) for k, t in load_tensors(checkpoint[ADAPTER_WEIGHTS]).items()}, self.name
        )
        fields: dict[str, dict[str, torch.Tensor]] = {}
        for path, tensor in load_tensors(checkpoint[OPTIMIZER]).items():
            key, _, field = path.rpartition("/")
            fields.setdefault(key, {})[field] = tensor
        self.random.state = fields.pop("random")
        for key, parameter in self.parameters.items():
            if key in fields:  # "step" stays on the CPU, where AdamW keeps it
                self.optimizer.state[parameter] = {
                    f: t if f == "step" else t.to(device) for f, t in fields[key].items()
                }
        # The lambdas are functions of the configuration, made anew with the schedule.
        self.schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None] * len(self.optimizer.param_groups)})
        for group, lr in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = lr
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]


def _config_json(config: LoraConfig) -> bytes:
    """As `PeftConfig.save_pretrained` writes it, for use rather than for more training."""
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(fields | {"inference_mode": True}, indent=2, sort_keys=True).encode()


def _on_cpu(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
