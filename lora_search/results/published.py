"""Published LoRA experiments as frames: the result files of PEFT's method comparison.

One JSON file an experiment, as huggingface/peft keeps them under method_comparison/MetaMathQA/results: Llama-3.2-3B
and others, trained on MetaMathQA, judged by the share of GSM8K problems solved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_search.errors import SweepError
from lora_search.results.rows import Row

METRIC, MODE = "accuracy", "max"
"""What the experiments are judged by."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Optimizer(_Part):
    lr: float | None = None
    weight_decay: float | None = None


class _Train(_Part):
    model_id: str
    batch_size: int
    max_steps: int
    seed: int | None = None
    grad_norm_clip: float | None = None
    lr_scheduler: str | None = None
    optimizer_type: str | None = None
    optimizer_kwargs: _Optimizer = _Optimizer()


class _Peft(_Part):
    peft_type: str | None = None
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    target_modules: str | list[str] | None = None
    use_rslora: bool | None = None


class _Info(_Part):
    experiment_name: str
    train_config: _Train
    peft_config: _Peft | None = None
    """None: full fine-tuning."""
    error_msg: str | None = None


class _Metrics(_Part):
    step: int
    valid_accuracy: float | None = Field(None, alias="valid accuracy")
    test_accuracy: float | None = Field(None, alias="test accuracy")
    train_loss: float | None = Field(None, alias="train loss")
    tokens_per_second: float | None = Field(None, alias="tokens / sec")
    elapsed: float | None = Field(None, alias="elapsed time")


class _Trained(_Part):
    status: str
    train_time: float | None = None
    num_trainable_params: int | None = None
    accelerator_memory_max: int | None = None
    metrics: list[_Metrics] = []


class _System(_Part):
    accelerator: str | None = None


class _Meta(_Part):
    system_info: _System = _System()


class Published(_Part):
    """One experiment's file, as much of it as we read."""

    run_info: _Info
    train_info: _Trained
    meta_info: _Meta = _Meta()

    def row(self, trial: int) -> Row:
        """The experiment as a row of `trials`."""
        info, trained = self.run_info, self.train_info
        train, peft = info.train_config, info.peft_config or _Peft()
        judged = [metrics for metrics in trained.metrics if metrics.valid_accuracy is not None]
        last = judged[-1] if judged else None
        succeeded = trained.status == "success"
        return {
            "trial": trial,
            "experiment": info.experiment_name,
            "model": train.model_id,
            "state": "completed" if succeeded else "failed",
            "steps": last.step if last else 0,
            "steps_total": train.max_steps,
            "peft_type": peft.peft_type,
            "rank": peft.r,
            "alpha": peft.lora_alpha,
            "dropout": peft.lora_dropout,
            "target_modules": peft.target_modules,
            "use_rslora": peft.use_rslora,
            "learning_rate": train.optimizer_kwargs.lr,
            "weight_decay": train.optimizer_kwargs.weight_decay,
            "batch_size": train.batch_size,
            "lr_schedule": train.lr_scheduler,
            "max_grad_norm": train.grad_norm_clip,
            "seed": train.seed,
            "accuracy": last.valid_accuracy if last else None,
            "test_accuracy": next((m.test_accuracy for m in trained.metrics if m.test_accuracy is not None), None),
            "train_loss": last.train_loss if last else None,
            "trainable_parameters": trained.num_trainable_params,
            "tokens_per_second": last.tokens_per_second if last else None,
            "seconds": trained.train_time,
            "peak_memory_bytes": trained.accelerator_memory_max,
            "host": self.meta_info.system_info.accelerator,
            "reason": None if succeeded else info.error_msg or trained.status,
        }

    def reports(self, trial: int) -> list[dict[str, Any]]:
        """The evaluations along the way, as rows of `reports`; the last one, on the test split, is in the row."""
        return [
            {
                "trial": trial,
                "step": metrics.step,
                "accuracy": metrics.valid_accuracy,
                "train_loss": metrics.train_loss,
                "tokens_per_second": metrics.tokens_per_second,
                "seconds": metrics.elapsed,
                "host": self.meta_info.system_info.accelerator,
            }
            for metrics in self.train_info.metrics
            if metrics.valid_accuracy is not None
        ]


def read_published(file: Path) -> Published:
    """One experiment.

    Raises:
        SweepError: the file is none of PEFT's method comparison; it says which key is wrong.
    """
    try:
        return Published.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise SweepError(
            f"{file}: {key + ': ' if key else ''}{first['msg']}; no result of PEFT's method comparison"
        ) from None
