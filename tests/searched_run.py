"""A run directory of a search as ASHA leaves it, of any size, written and not trained."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

SETS = ("attention-qv", "attention", "all-linear")
RANKS = (4, 8, 16, 32, 64)

SWEEP: dict[str, Any] = {
    "name": "searched",
    "search": {
        "space": {
            "rank": {"choice": list(RANKS)},
            "alpha_ratio": {"choice": [1, 2, 4]},
            "dropout": {"uniform": [0.0, 0.15]},
            "target_modules": {"choice": list(SETS)},
            "learning_rate": {"log_uniform": [1e-4, 1e-2]},
        },
        "scheduler": {"first_rung": 10, "reduction_factor": 3},
    },
    "training": {"steps": 90, "eval_every": 10},
}

CONCLUSION = {
    "validation_loss": 0.7,
    "untrained_validation_loss": 5.9,
    "test_loss": 0.8060177,
    "untrained_test_loss": 6.0617,
    "test_loss_interval": [0.7512, 0.8633],
    "merged_onto": "dequantized",
    "merged_loss": 0.71,
}


def write_searched(
    folder: Path, trials: int, *, conclusion: dict[str, Any] | None = None, points: int = 9, seed: int = 0
) -> Path:
    """A run of so many trials, each with up to `points` reports; the learning rate decides, and the target set."""
    draw = random.Random(seed)
    sweep = json.loads(json.dumps(SWEEP))
    sweep["search"]["trials"] = max(1, trials)
    sweep["training"] = {"steps": 10 * points, "eval_every": 10}
    events: list[dict[str, Any]] = []
    for trial in range(trials):
        events += trial_events(trial, draw, points)
    events.sort(key=lambda event: event["time"])
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    (folder / "trials.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    facts: dict[str, Any] = {"hosts": [{"name": "host-0", "capacity": 2}, {"name": "host-1", "capacity": 2}]}
    if conclusion is not None:
        facts["conclusion"] = conclusion
    (folder / "provenance.json").write_text(json.dumps(facts))
    return folder


def trial_events(trial: int, draw: random.Random, points: int) -> list[dict[str, Any]]:
    rank, ratio, target = draw.choice(RANKS), draw.choice((1, 2, 4)), draw.choice(SETS)
    rate = 10 ** draw.uniform(-4, -2)
    parameters = {
        "rank": rank,
        "alpha": float(rank * ratio),
        "alpha_ratio": ratio,
        "dropout": draw.uniform(0, 0.15),
        "target_modules": target,
        "learning_rate": rate,
    }
    speed = 0.02 * (1 + SETS.index(target)) * (1 + math.log10(rate / 1e-4))
    begin = 1000.0 + 5 * trial
    ends = points if speed > 0.1 else draw.choice((1, 3)) if points >= 3 else 1
    events: list[dict[str, Any]] = [{"event": "start", "trial": trial, "time": begin, "parameters": parameters}]
    for point in range(1, ends + 1):
        step = 10 * point
        loss = 0.7 + 5 * math.exp(-speed * step) + draw.uniform(0, 0.02)
        events.append(
            {
                "event": "report",
                "trial": trial,
                "time": begin + 2 * point,
                "step": step,
                "steps_total": 10 * points,
                "eval_loss": loss,
                "train_loss": loss,
                "tokens": 340 * step,
                "seconds": 1.8 * point,
                "trainable_parameters": 2560 * rank * (1 + SETS.index(target)),
                "peak_memory_bytes": 700_000_000 + 100_000 * trial,
                "trial_memory_bytes": (1 + SETS.index(target)) * 6_000_000 + 40_960 * rank,
                "host": f"host-{trial % 2}",
            }
        )
    state = "completed" if ends == points else "stopped"
    events.append({"event": "end", "trial": trial, "time": begin + 2 * ends, "state": state, "reason": None})
    return events
