"""The sweep file's schema: every key, its default and its meaning."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lora_search.spec.domain import AnyDomain, Choice, Domain, Fixed, IntUniform, LogUniform, Uniform

TARGET_SETS = ("attention-qv", "attention", "mlp", "all-linear")
"""The named target sets; any other string is a regular expression, a list is names of modules."""

METRIC_MODES: dict[str, Literal["min", "max"]] = {
    "eval_loss": "min",
    "perplexity": "min",
    "token_accuracy": "max",
    "train_loss": "min",
}

MOST_COUNT = 10_000_000
"""Of steps, and of sequences: more is a mistake in writing."""

Auto = Literal["auto"]
Quantization = Literal["nf4", "none"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Section(BaseModel):
    """A mapping of the sweep file: known keys only, values of the stated type only, never changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Base(Section):
    """The frozen pretrained model."""

    model: str = Field("builtin:demo", min_length=1, description="a hub id, a local folder, or builtin:NAME")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    quantization: Quantization = Field("nf4", description="nf4: 4-bit NormalFloat, double quantisation (QLoRA)")
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="dtype of the matrix products; auto: bfloat16 where the device computes it, else float32. float16 "
        "has no loss scaling here: small gradients vanish. Measured against float32's, on a small base, gradients were "
        "off by 0.1 % at a batch of 16 and by 0.8 % at 1,024; bfloat16's by 0.6 to 0.8 %",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations backwards: less memory, more time")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class Columns(Section):
    """What the data set calls the columns we read."""

    prompt: str = Field("prompt", description="of prompt-completion")
    completion: str = Field("completion", description="of prompt-completion")
    messages: str = Field("messages", description="of chat: a list of {role, content}")
    text: str = Field("text", description="of text")


class Data(Section):
    """The data set and how its rows become token sequences."""

    path: str = Field(
        "builtin:demo",
        min_length=1,
        description="JSONL, JSON, CSV, Parquet, a folder, a hub id, builtin:NAME; text stands as it is written, and so "
        "does a number in JSON; of Parquet, whole numbers are read too, and nothing else that is no text",
    )
    name: str | None = Field(None, description="configuration of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    format: Literal["text", "prompt-completion", "chat"] = Field(
        "prompt-completion", description="what a row is; the loss counts a completion, an assistant's turns, or all"
    )
    columns: Columns = Columns()
    template: str = Field("{prompt}\n", description="how a prompt stands before its completion")
    max_length: int = Field(
        256,
        ge=2,
        description="tokens; a longer row is cut at its end. No row may be longer than a base's table of positions",
    )
    limit: int | None = Field(None, ge=1, description="read only the first so many rows of path")
    validation: float | str = Field(
        0.1, description="share of the rows, or a path, whose rows are left out of what is trained on"
    )
    test: float | str = Field(0.1, description="as validation; touched once, at the end")

    @field_validator("template")
    @classmethod
    def _has_prompt(cls, template: str) -> str:
        if "{prompt}" not in template:
            raise ValueError("must contain {prompt}")
        return template

    @model_validator(mode="after")
    def _shares_leave_rows(self) -> Self:
        for key in ("validation", "test"):
            share = getattr(self, key)
            if isinstance(share, float) and not 0 < share < 1:
                raise ValueError(f"{key}: found {share}; should be a share above 0 and below 1, or a path")
        shares = [share for share in (self.validation, self.test) if isinstance(share, float)]
        if sum(shares) >= 1:
            raise ValueError(f"validation and test leave no rows to train on: their shares add up to {sum(shares)}")
        return self


class Lora(Section):
    """The adapter of a trial. Defaults hold for what `search.space` does not name."""

    rank: int = Field(16, ge=1, le=4096, description="r: columns of A and rows of B (LoRA, arXiv:2106.09685)")
    alpha: float | None = Field(None, gt=0, description="scaling numerator; or give alpha_ratio")
    alpha_ratio: float = Field(2.0, gt=0, description="alpha = alpha_ratio * rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="share of the adapter's input that a step leaves out")
    target_modules: str | list[str] = Field("all-linear", min_length=1, description="a target set, a list, a regex")
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)")


class Training(Section):
    """How a trial is trained. Any of these keys may stand in `search.space` as well."""

    learning_rate: float = Field(2e-4, gt=0, description="the highest of the schedule")
    steps: int = Field(90, ge=1, le=MOST_COUNT, description="optimiser steps")
    batch_size: int = Field(4, ge=1, le=MOST_COUNT, description="sequences in one forward pass")
    gradient_accumulation_steps: int = Field(1, ge=1, le=MOST_COUNT, description="forward passes in one optimiser step")
    eval_every: int = Field(10, ge=1, le=MOST_COUNT, description="optimiser steps between reports")
    warmup_ratio: float = Field(0.05, ge=0, le=1, description="share of the steps in which the learning rate rises")
    lr_schedule: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = Field("cosine", description="a schedule of transformers.get_scheduler")
    optimizer: Literal["adamw"] = Field("adamw", description="AdamW (arXiv:1711.05101)")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the mean of squared gradients")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to the root of the latter")
    max_grad_norm: float = Field(1.0, ge=0, description="a longer gradient is cut to this L2 norm; 0: no clipping")
    weight_decay: float = Field(0.0, ge=0, description="decoupled from the gradient")
    seed: int = Field(0, ge=0, lt=2**31, description="initialisation, dropout and order of the data")


LORA_KEYS = tuple(Lora.model_fields)
SPACE_KEYS = (*Lora.model_fields, *Training.model_fields)


class Sampler(Section):
    """What proposes the trials."""

    name: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="tpe: learns from the trials before; grid: every combination of choices"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the proposals")


class Asha(Section):
    """Asynchronous successive halving (arXiv:1810.05934), rungs counted in optimiser steps; `none` stops nothing."""

    name: Literal["asha", "none"] = Field("asha", description="none: every trial is trained to its last step")
    first_rung: int | None = Field(None, ge=1, description="steps before the first comparison; default eval_every")
    reduction_factor: float = Field(
        3, ge=1.1, description="1 of so many trials goes on at each rung, and rungs lie so many times further apart"
    )


def guide_space() -> dict[str, AnyDomain]:
    """The space of the usual LoRA guide, taken where `search.space` is left out."""
    return {
        "rank": Choice((4, 8, 16, 32, 64)),
        "alpha_ratio": Choice((2, 3, 4)),
        "dropout": Uniform(0.0, 0.15),
        "target_modules": Choice(("attention-qv", "attention", "all-linear")),
        "learning_rate": LogUniform(1e-5, 1e-3),
    }


class Search(Section):
    """What is searched, by what measure, and how long."""

    space: dict[str, Domain] = Field(
        default_factory=guide_space,
        min_length=1,
        description="what is searched, by name; default: the usual LoRA guide's",
    )
    enqueue: list[dict[str, Any]] | None = Field(
        None, description="configurations to try first; default: rank 16, alpha 32, dropout 0.05 where allowed"
    )
    metric: Literal["eval_loss", "perplexity", "token_accuracy", "train_loss"] = Field(
        "eval_loss", description="what trials are judged by; eval_loss: nats a target token of the validation split"
    )
    mode: Literal["min", "max"] = Field("min", description="follows from the metric where it is left out")
    sampler: Sampler = Sampler()
    scheduler: Asha = Asha()
    trials: int = Field(24, ge=1, le=100_000, description="configurations to try")

    @model_validator(mode="before")
    @classmethod
    def _mode_follows_metric(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "mode" not in raw and raw.get("metric") in METRIC_MODES:
            return {**raw, "mode": METRIC_MODES[raw["metric"]]}
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in self.space:
            if name not in SPACE_KEYS:
                raise ValueError(f"space.{name}: {unknown_key(name, SPACE_KEYS)}")
        if self.mode != METRIC_MODES[self.metric]:
            raise ValueError(f"mode: {self.metric} is better when {METRIC_MODES[self.metric]}imal; found {self.mode}")
        if {"alpha", "alpha_ratio"} <= self.space.keys():
            raise ValueError("space: give alpha or alpha_ratio, not both")
        if self.sampler.name == "grid":
            endless = [name for name, d in self.space.items() if isinstance(d, Uniform | LogUniform)]
            if endless:
                raise ValueError(f"sampler: a grid needs choices, and {', '.join(endless)} is a continuous range")
        for index, configuration in enumerate(self.enqueue or []):
            self._check_enqueued(index, configuration)
        return self

    def _check_enqueued(self, index: int, configuration: dict[str, Any]) -> None:
        for name, value in configuration.items():
            domain = self.space.get(name)
            if domain is None:
                raise ValueError(f"enqueue[{index}]: {name} is not in search.space; it has {', '.join(self.space)}")
            if not domain.contains(value):
                raise ValueError(f"enqueue[{index}].{name}: {value!r} is outside of {domain.plain()}")


class Hosts(Section):
    """The actors that own the devices and train the trials."""

    count: Auto | int = Field("auto", description="auto: one a GPU of the cluster, or one a group of cores")
    gpus_per_host: int = Field(1, ge=0, description="0: train on the CPU even where there are GPUs")
    cpus_per_host: Auto | int = Field("auto", description="cores of a host")
    trials_per_host: Auto | int = Field("auto", description="trials resident on a host at once")
    wait_s: float = Field(
        0,
        ge=0,
        description="seconds to wait for GPUs that an autoscaler has yet to start, and for new ones when all are lost",
    )
    max_retries: int = Field(3, ge=0, description="in a row, of a trial whose machine or host is lost")

    @field_validator("count", "cpus_per_host", "trials_per_host")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"must be auto or at least 1; found {value}")
        return value


class Wandb(Section):
    """Weights & Biases."""

    project: str = Field("lora-search", description="where the runs go")
    entity: str | None = Field(None, description="user or team; default: yours")
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online where an API key is set, else offline"
    )


class Tracking(Section):
    """Where results are recorded besides the run directory."""

    wandb: Wandb = Wandb()


class SweepSpec(Section):
    """One sweep: one search, one run directory."""

    name: Name = Field("sweep", description="of the run directory: letters, digits and . _ -")
    base: Base = Base()
    data: Data = Data()
    search: Search = Field(default_factory=lambda: Search())
    training: Training = Training()
    hosts: Hosts = Hosts()
    tracking: Tracking = Tracking()
    output: str = Field("runs", min_length=1, description="folder that holds the run directories")

    @model_validator(mode="after")
    def _space_fits(self) -> Self:
        for name, domain in self.search.space.items():
            for value in domain.probes():
                _check_value(name, value, isinstance(domain, Choice | Fixed | IntUniform))
        return self

    @property
    def max_steps(self) -> int:
        """The largest number of optimiser steps that a trial of this sweep may take."""
        domain = self.search.space.get("steps")
        return int(max(domain.probes())) if domain else self.training.steps


def _check_value(name: str, value: Any, discrete: bool) -> None:
    section = Lora if name in Lora.model_fields else Training
    integer = section.model_fields[name].annotation is int
    if integer and not discrete:
        raise ValueError(f"search.space.{name}: whole numbers only; use choice or int_uniform")
    try:
        section.model_validate({name: value})
    except ValidationError as error:
        reason = plain_reason(error.errors()[0]["msg"])
        hint = f"; to search over several values: {{choice: {value}}}" if isinstance(value, list) else ""
        raise ValueError(f"search.space.{name}: found {value!r}; {reason}{hint}") from None
    if name == "target_modules" and isinstance(value, str) and value not in TARGET_SETS:
        try:
            re.compile(value.removeprefix("re:"))
        except re.error as error:
            raise ValueError(
                f"search.space.target_modules: {value!r} is neither a target set ({', '.join(TARGET_SETS)}) "
                f"nor a regular expression ({error})"
            ) from None


def unknown_key(found: str, known: Iterable[str]) -> str:
    """What is said of a key that does not exist: the nearest known one, and all of them."""
    known = list(known)
    nearest = difflib.get_close_matches(found, known, n=1, cutoff=0.5)
    hint = f" (did you mean '{nearest[0]}'?)" if nearest else ""
    return f"unknown key '{found}'{hint}; allowed: {', '.join(known)}"


def plain_reason(message: str) -> str:
    """Pydantic's reason as part of a sentence of ours."""
    message = message.removeprefix("Input ").removesuffix(" after validation, not 0")
    return message[:1].lower() + message[1:].replace("Dictionary", "a mapping")
