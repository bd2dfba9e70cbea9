"""What was found: one sentence, the figures under it, and the commands to go on with."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_search.report.values import count, number
from lora_search.results import Row, Run, ahead_row

METRICS = {
    "eval_loss": ("validation loss", "nats a token"),
    "perplexity": ("validation perplexity", ""),
    "token_accuracy": ("validation token accuracy", "share"),
    "train_loss": ("training loss", "nats a token"),
}
"""Label and unit of what trials are judged by."""


@dataclass(frozen=True)
class Tested:
    """Losses from provenance.json's conclusion, in nats a token; None where it does not say."""

    trial: int | None
    validation: float | None
    untrained_validation: float | None
    test: float | None
    untrained_test: float | None
    interval: tuple[float, float] | None
    """95 %, of the test loss."""
    merged: float | None
    merged_onto: str | None

    def to_dict(self) -> dict[str, Any]:
        return self.__dict__ | {"interval": list(self.interval) if self.interval else None}


def tested(conclusion: Any) -> Tested | None:
    """What the conclusion says, read as somebody else's."""
    if not isinstance(conclusion, dict):
        return None
    trial, onto, interval = (conclusion.get(key) for key in ("trial", "merged_onto", "test_loss_interval"))
    ends = [number(end) for end in interval] if isinstance(interval, list) and len(interval) == 2 else []
    return Tested(
        trial=trial if isinstance(trial, int) else None,
        validation=number(conclusion.get("validation_loss")),
        untrained_validation=number(conclusion.get("untrained_validation_loss")),
        test=number(conclusion.get("test_loss")),
        untrained_test=number(conclusion.get("untrained_test_loss")),
        interval=(ends[0], ends[1]) if ends and ends[0] is not None and ends[1] is not None else None,
        merged=number(conclusion.get("merged_loss")),
        merged_onto=onto if isinstance(onto, str) else None,
    )


def headline(run: Run, rows: Sequence[Row], best: Row | None, found: Tested | None, state: str) -> str:
    """One sentence: the best trial, its value, against the untrained base, on the test split with its interval."""
    label, unit = METRICS[run.metric]
    ended = sum(row["state"] != "running" for row in rows)
    if best is None:
        if not rows:
            return "No trial has begun yet."
        failed = sum(row["state"] == "failed" for row in rows)
        return f"No trial has come to a result yet: {count(len(rows), 'trial')}, {failed} failed."
    value = best[run.metric]
    line = f"Trial {best['trial']} is the best of {ended}: {label} {value:.4f}{' ' + unit if unit else ''}"
    if found is None or found.trial != best["trial"]:
        if state == "finished":
            return line + "."
        ahead = ahead_row(rows, run.metric, run.spec.search.mode)
        return line + (
            f" so far; trial {ahead['trial']}, not at its end, has {ahead[run.metric]:.4f}." if ahead else " so far."
        )
    if found.untrained_validation is not None and run.metric == "eval_loss":
        line += f", where the untrained base has {found.untrained_validation:.4f}"
    if found.test is not None:
        line += f". On the test split, touched once: {found.test:.4f}"
        if found.interval is not None:
            line += f" (95 % interval {found.interval[0]:.4f} to {found.interval[1]:.4f})"
        if found.untrained_test is not None:
            line += f", untrained {found.untrained_test:.4f}"
    return line + "."


def commands(run: Run, best: Mapping[str, Any]) -> list[dict[str, str]]:
    """What to do next with the best trial, to be copied."""
    place, trial = shlex.quote(run.directory.place), best["trial"]
    out = shlex.quote(f"{run.name}-trial-{trial}")
    found = [
        ("Merge it into a standard model", f"lora-search merge {place} --trial {trial} --out {out}-merged"),
        ("Export its adapter for PEFT", f"lora-search export {place} --trial {trial} --to peft --out {out}-adapter"),
        ("Export it as a TRL script", f"lora-search export {place} --trial {trial} --to trl --out {out}-trl"),
        ("All trials as a table", f"lora-search results {place} --format csv --out {shlex.quote(run.name)}.csv"),
    ]
    if run.directory.uri is None and (run.directory.best / "config.yaml").is_file():
        config = shlex.quote(str(run.directory.best / "config.yaml"))
        found.insert(2, ("Train this one configuration again", f"lora-search run {config}"))
    return [{"what": what, "command": command} for what, command in found]
