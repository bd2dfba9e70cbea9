"""Export as a W&B sweep, narrowed around the best trials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lora_search.errors import InputError
from lora_search.export.fill import fill
from lora_search.export.material import Material
from lora_search.export.narrow import best_quarter, narrowed, word
from lora_search.export.page import Page, installed
from lora_search.export.script import SCRIPT, base_file, common_limits, values, where
from lora_search.export.trained import Trained
from lora_search.spec import Choice, Fixed
from lora_search.spec.schema import Training

FILE = "sweep.yaml"

LOGGED = ("eval_loss", "perplexity")
"""What the program logs."""


def write(trained: Trained, out: Path) -> Page:
    """The sweep's configuration, its program, and the rows.

    Raises:
        InputError: no trial has come to a result.
    """
    search, material = trained.spec.search, Material(trained)
    best = best_quarter(trained.rows, search.metric, search.mode)
    if not best:
        raise InputError(f"--to wandb: no trial of {trained.run.place} has come to a result to narrow the space around")
    config = _sweep(trained, narrowed(search.space, best))
    head = "# A W&B sweep around the best trials of a lora-search run. README.md says how it was narrowed.\n"
    (out / FILE).write_text(head + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    found = values(trained, material) | {
        "project": trained.spec.tracking.wandb.project,
        "defaults": json.dumps(_defaults(trained)),
        "targets": json.dumps(_targets(trained, material)),
    }
    parts = {"where": where(trained, material.copy_base(out)), "checkpointing": _checkpointing(trained)}
    (out / SCRIPT).write_text(fill("wandb.py.txt", found, parts), encoding="utf-8")
    rows = material.write_rows(out, in_order=False)
    return Page(
        title="A W&B sweep around the best trials",
        commands=[f"wandb sweep {FILE}", "wandb agent SWEEP_ID  # as the line before says"],
        files={FILE: "the sweep", SCRIPT: "its program; also runs alone, as the exported trial"} | base_file(trained),
        made_for=installed("wandb", "transformers", "peft", "bitsandbytes", "torch", "datasets"),
        rows=rows,
        notes=[
            f"Narrowed around the best quarter of the trials by {search.metric} (trials "
            f"{', '.join(str(row['trial']) for row in best)}): a range is what they span, widened by a quarter of that "
            "on both sides (on a log scale where the range is log-uniform) and cut at the old bounds; a choice keeps "
            "the values that occur among them. Everything else has the exported trial's value.",
            "The rows are token ids, made by lora-search from the run's data set, template, split and `max_length`; "
            "the program reads the train split in the order that belongs to its seed, as lora-search does.",
        ],
        limits=_limits(trained),
    )


def _sweep(trained: Trained, parameters: dict[str, dict[str, Any]]) -> dict[str, Any]:
    search = trained.spec.search
    metric = search.metric if search.metric in LOGGED else "eval_loss"
    config: dict[str, Any] = {
        "name": f"{trained.spec.name}-narrowed",
        "project": trained.spec.tracking.wandb.project,
        "program": SCRIPT,
        "method": {"tpe": "bayes", "random": "random", "grid": "random"}[search.sampler.name],
        "metric": {"name": metric, "goal": "minimize"},
        "run_cap": search.trials,
    }
    if search.scheduler.name == "asha":
        first = search.scheduler.first_rung or trained.spec.training.eval_every
        config["early_terminate"] = {
            "type": "hyperband",
            "min_iter": max(1, round(first / trained.spec.training.eval_every)),
            "eta": max(2, round(search.scheduler.reduction_factor)),
        }
    return config | {"parameters": parameters}


def _defaults(trained: Trained) -> dict[str, Any]:
    """Each parameter of the program, with the exported trial's value."""
    lora = trained.config.lora
    found: dict[str, Any] = {"rank": lora.rank, "dropout": lora.dropout, "use_rslora": lora.use_rslora}
    if lora.alpha is None:
        found["alpha_ratio"] = float(lora.alpha_ratio)
    else:
        found["alpha"] = float(lora.alpha)
    training = trained.config.training.model_dump(exclude={"optimizer"})
    decimal = {name for name, field in Training.model_fields.items() if field.annotation is float}
    training = {name: float(value) if name in decimal else value for name, value in training.items()}
    return found | {"target_modules": word(lora.target_modules)} | training


def _targets(trained: Trained, material: Material) -> dict[str, dict[str, list[str]]]:
    """The modules of each value that `target_modules` may have."""
    domain = trained.spec.search.space.get("target_modules")
    named = list(domain.probes()) if isinstance(domain, Choice | Fixed) else []
    return {
        word(value): {"modules": material.module_names(value), "parameters": material.parameter_names(value)}
        for value in [trained.config.lora.target_modules, *named]
    }


def _checkpointing(trained: Trained) -> str:
    return f"            gradient_checkpointing={trained.spec.base.gradient_checkpointing},\n"


def _limits(trained: Trained) -> list[str]:
    search = trained.spec.search
    found = [line for line in common_limits(trained) if "schedule spans" not in line]
    found.append("W&B's agents train one configuration a process; lora-search trained many on one base.")
    if search.scheduler.name == "asha":
        found.append(
            "ASHA has become W&B's hyperband, which counts the times that a loss was logged and stops by brackets of "
            "its own."
        )
    if search.sampler.name != "random":
        method = "bayes, a Gaussian process" if search.sampler.name == "tpe" else "random: a narrowed grid has ranges"
        found.append(f"The sampler {search.sampler.name} has become {method}.")
    if search.metric not in LOGGED:
        found.append(f"The program does not measure {search.metric}; the sweep minimises eval_loss instead.")
    if len(search.enqueue or []):
        found.append("`search.enqueue` has no counterpart: the configurations to try first are left out.")
    return found
