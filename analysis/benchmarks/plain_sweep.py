"""The sweep that lora-search does, as a careful user would write it: Ray Tune, PEFT and transformers' Trainer.

    python analysis/benchmarks/plain_sweep.py SWEEP.yaml --out FOLDER [--set key.path=value ...] [--concurrent 2]

Reads the same sweep file, so that both do the same: trials, data, order of the rows, schedule, steps at which they
report, rungs. A trial has one core and one thread, and as many run at once as there are cores. At the end the best
adapter is loaded again, tested, and merged into the dequantised base. FOLDER gets trials.json, adapter and merged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

from lora_search.data import TokenizedData, TokenSplit, tokenize_data
from lora_search.model import load_tokenizer
from lora_search.space import first_rung, report_steps, trial_config
from lora_search.spec import Choice, Domain, Fixed, LogUniform, SweepSpec, Uniform, load_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EVALUATION_BATCH = 32


def load_4bit(spec: SweepSpec) -> PreTrainedModel:
    """The base in NF4 with double quantisation, what is not quantised in float32."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lora_search.model import compute_dtype, model_path

    model = AutoModelForCausalLM.from_pretrained(
        model_path(spec.base.model),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(spec.base.compute_dtype, torch.device("cpu")),
        ),
        device_map={"": "cpu"},
    )
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, Linear4bit):  # or evaluation fails for some shapes on a CPU with AVX512-BF16
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def padded(split: TokenSplit, rows: list[int], pad_token_id: int) -> dict[str, Any]:
    """Rows as the model takes them, padded to the longest of them."""
    from lora_search.data import collate

    batch = collate(split, rows, pad_token_id)
    labels = batch.input_ids_BT.masked_fill(~batch.trained_BT, -100)
    return {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT, "labels": labels}


def evaluate(model: Any, split: TokenSplit, pad_token_id: int) -> float:
    """Nats a target token; rows of like length together, to pad little."""
    import torch

    rows = split.lengths_N.argsort(kind="stable").tolist()
    total, targets = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), EVALUATION_BATCH):
            batch = padded(split, rows[start : start + EVALUATION_BATCH], pad_token_id)
            count = int((batch["labels"] != -100).sum())
            total += float(model(**batch).loss) * count
            targets += count
    return total / targets


def train(config: dict[str, Any], spec: SweepSpec, data: TokenizedData) -> None:
    """One trial; reports the validation loss and the adapter to Ray Tune."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from lora_search.data import training_rows
    from lora_search.targets import module_tree, resolve

    torch.set_num_threads(1)
    trial = trial_config(spec, config["params"])
    training, lora = trial.training, trial.lora
    model = load_4bit(spec)
    dtype = model.config.quantization_config.bnb_4bit_compute_dtype
    targets = resolve(module_tree(model), lora.target_modules)
    torch.manual_seed(training.seed)
    adapted = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=trial.alpha,  # PEFT says int and takes any number
            lora_dropout=lora.dropout,
            target_modules=list(targets.modules),
            use_rslora=lora.use_rslora,
        ),
    )
    rows = training_rows(len(data.train), training.seed, 0, training.steps * training.batch_size)
    reports = report_steps(spec, trial)

    class InOrder(Trainer):  # type: ignore[misc]
        """Reads the rows in the order in which lora-search reads them; the loss is a mean over tokens, as there."""

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(rows)

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            with self.compute_loss_context_manager():
                return {"eval_loss": evaluate(self.model, data.validation, data.pad_token_id)}

    class Reports(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in reports:
                found = trainer.evaluate()
                with tempfile.TemporaryDirectory() as folder:
                    adapted.save_pretrained(folder)
                    checkpoint = tune.Checkpoint.from_directory(folder)
                    tune.report({**found, "step": state.global_step, "pid": os.getpid()}, checkpoint=checkpoint)

    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=adapted,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=training.steps,
                per_device_train_batch_size=training.batch_size,
                learning_rate=training.learning_rate,
                lr_scheduler_type=training.lr_schedule,
                warmup_steps=training.warmup_ratio,  # below 1, a share of the steps
                weight_decay=training.weight_decay,
                max_grad_norm=training.max_grad_norm,
                optim="adamw_torch_fused",
                bf16=dtype == torch.bfloat16,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                dataloader_num_workers=0,
                remove_unused_columns=False,
            ),
            train_dataset=rows,
            data_collator=lambda picked: padded(data.train, picked, data.pad_token_id),
            callbacks=[Reports()],
        )
        trainer.train()


def search(
    spec: SweepSpec, data: TokenizedData, out: Path, concurrent: int, cpus: float, fresh: bool
) -> tune.ResultGrid:
    """All trials, `concurrent` of them at once."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    grid = spec.search.sampler.name == "grid"
    space = spec.search.space
    params = tune.grid_search(configurations(spec)) if grid else {name: drawn(domain) for name, domain in space.items()}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(train, spec=spec, data=data), {"cpu": cpus}),
        param_space={"params": params},
        tune_config=tune.TuneConfig(
            metric=spec.search.metric,
            mode=spec.search.mode,
            num_samples=1 if grid else spec.search.trials,
            search_alg=None if grid else OptunaSearch(seed=spec.search.sampler.seed),
            scheduler=scheduler(spec),
            max_concurrent_trials=concurrent,
            reuse_actors=not fresh,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(out.resolve()),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            verbose=0,
        ),
    )
    return tuner.fit()


def configurations(spec: SweepSpec) -> list[dict[str, Any]]:
    """The points of a grid, as many as the sweep has trials."""
    names, domains = zip(*spec.search.space.items(), strict=True)
    points = itertools.product(*(domain.probes() for domain in domains))
    return [dict(zip(names, point, strict=True)) for point in itertools.islice(points, spec.search.trials)]


def drawn(domain: Domain) -> Any:
    """A domain in Ray Tune's terms."""
    match domain:
        case Fixed(value):
            return value
        case Choice(values):
            return tune.choice(list(values))
        case Uniform(low, high):
            return tune.uniform(low, high)
        case LogUniform(low, high):
            return tune.loguniform(low, high)
    raise TypeError(f"{domain} is not used by the benchmarks")


def scheduler(spec: SweepSpec) -> Any:
    if spec.search.scheduler.name == "none":
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="step",
        max_t=spec.max_steps,
        grace_period=first_rung(spec),
        reduction_factor=spec.search.scheduler.reduction_factor,
    )


def conclude(spec: SweepSpec, data: TokenizedData, best: tune.Result, out: Path) -> float:
    """Test the best adapter, and save it, alone and merged into the dequantised base; the test loss."""
    import torch
    from peft import PeftModel

    torch.set_num_threads(1)  # as in a trial: a second thread gains little on such bases, and waits by spinning
    if best.checkpoint is None:
        raise RuntimeError(f"the best trial left no checkpoint: {best.error}")
    with best.checkpoint.as_directory() as folder:
        adapted = PeftModel.from_pretrained(load_4bit(spec), folder)
        loss = evaluate(adapted, data.test, data.pad_token_id)
        adapted.save_pretrained(str(out / "adapter"))
        merged = PeftModel.from_pretrained(load_4bit(spec).dequantize(torch.float32), folder).merge_and_unload()
    merged.save_pretrained(str(out / "merged"))
    load_tokenizer(spec.base).save_pretrained(str(out / "merged"))
    return loss


def row(spec: SweepSpec, result: tune.Result) -> dict[str, Any]:
    """A trial in lora-search's terms."""
    metrics = result.metrics or {}
    if "step" not in metrics:
        return {"state": "failed", "reason": str(result.error)}
    trial = trial_config(spec, (result.config or {})["params"])
    state = "completed" if metrics["step"] >= trial.training.steps else "stopped"
    figures = {name: metrics[name] for name in ("eval_loss", "pid")}
    return {"state": state, "steps": metrics["step"], **trial.parameters(), **figures}


def main() -> None:
    """Search, conclude, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--concurrent", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--fresh", action="store_true", help="a process for each trial, Ray Tune's default")
    arguments = parser.parse_args()
    spec = load_spec(arguments.sweep, arguments.set)
    arguments.out.mkdir(parents=True, exist_ok=True)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    share = min(1.0, (os.cpu_count() or 1) / arguments.concurrent)
    results = search(spec, data, arguments.out, arguments.concurrent, share, arguments.fresh)
    loss = conclude(spec, data, results.get_best_result(scope="last"), arguments.out)
    found = {"test_loss": loss, "trials": [row(spec, result) for result in results]}
    (arguments.out / "trials.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
