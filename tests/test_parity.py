"""Parity: the engine's losses are those of PEFT and transformers' Trainer on the same data in the same order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_search.data import TokenizedData
    from lora_search.space import TrialConfig
    from lora_search.spec import SweepSpec

STEPS = 20

CONFIGURATIONS: list[dict[str, Any]] = [
    {"rank": 16, "alpha": 32.0, "target_modules": "all-linear", "learning_rate": 5e-3},
    {
        "rank": 4,
        "alpha": 4.0,
        "target_modules": "attention-qv",
        "learning_rate": 2e-2,
        "lr_schedule": "linear",
        "warmup_ratio": 0.2,
        "weight_decay": 0.1,
        "gradient_accumulation_steps": 3,
        "batch_size": 2,
    },
    {
        "rank": 8,
        "alpha": 16.0,
        "use_rslora": True,
        "target_modules": "mlp",
        "learning_rate": 1e-3,
        "lr_schedule": "constant_with_warmup",
        "max_grad_norm": 0.1,
        "adam_beta2": 0.95,
    },
]


@pytest.mark.parametrize("index", range(len(CONFIGURATIONS)), ids=["cosine", "accumulated", "rslora-clipped"])
def test_losses_equal_those_of_the_trainer(
    tiny_spec: SweepSpec, tiny_data: TokenizedData, tmp_path: Path, index: int
) -> None:
    from lora_search.space import trial_config

    configs = [
        trial_config(tiny_spec, {"dropout": 0.0, "steps": STEPS, "seed": 3, **sampled}) for sampled in CONFIGURATIONS
    ]
    theirs = trainer_losses(tiny_spec, tiny_data, configs[index], tmp_path)
    (alone,) = engine_losses(tiny_spec, tiny_data, configs[index : index + 1])
    packed = engine_losses(tiny_spec, tiny_data, configs)[index]
    for company, ours in (("alone", alone), ("packed", packed)):
        worst = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
        print(f"{company}: largest relative difference {worst:.1e}")
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert max(theirs) - min(theirs) > 0.02  # something was learned, or there is nothing to compare


def engine_losses(spec: SweepSpec, data: TokenizedData, configs: Sequence[TrialConfig]) -> list[list[float]]:
    """The losses of each configuration, all trained in one pack."""
    from lora_search.engine import Engine, StepMetrics
    from lora_search.model import load_base

    engine = Engine(load_base(spec.base, "cpu"), data)
    for index, config in enumerate(configs):
        engine.admit(str(index), config)
    losses: list[list[float]] = [[] for _ in configs]
    for _ in range(STEPS):
        for name, outcome in engine.step(engine.residents).items():
            assert isinstance(outcome, StepMetrics)
            losses[int(name)].append(outcome.loss)
    return losses


def trainer_losses(spec: SweepSpec, data: TokenizedData, config: TrialConfig, folder: Path) -> list[float]:
    """The usual recipe: PEFT's wrapper around the 4-bit base, the Trainer around that."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from torch.utils.data import SequentialSampler
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from lora_search.data import collate, training_rows
    from lora_search.targets import module_tree, resolve

    training = config.training
    model = AutoModelForCausalLM.from_pretrained(
        spec.base.model,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    targets = resolve(module_tree(model), config.lora.target_modules)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(training.seed)
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora.rank,
            lora_alpha=config.alpha,
            lora_dropout=0.0,
            target_modules=list(targets.modules),
            use_rslora=config.lora.use_rslora,
        ),
    )
    per_step = training.batch_size * training.gradient_accumulation_steps
    rows = training_rows(len(data.train), training.seed, 0, STEPS * per_step)

    def as_labels(picked: list[int]) -> dict[str, Any]:
        batch = collate(data.train, picked, data.pad_token_id)
        labels = batch.input_ids_BT.masked_fill(~batch.trained_BT, -100)
        return {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT, "labels": labels}

    class InOurOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(rows)

    losses: list[float] = []

    class Losses(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    trainer = InOurOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=training.batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.lr_schedule,
            warmup_steps=training.warmup_ratio,  # below 1, a share of the steps
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_epsilon=training.adam_epsilon,
            max_grad_norm=training.max_grad_norm,
            optim="adamw_torch",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=as_labels,
        callbacks=[Losses()],
    )
    trainer.train()
    return losses
