"""best/README.md: the model card of the best adapter, with the search's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lora_search.best.conclude import Conclusion
from lora_search.errors import cell
from lora_search.results import column, ranked_rows
from lora_search.rundir import RunDirectory
from lora_search.spec import SweepSpec

SHOWN = 10
"""Trials in the card's table."""


def write_card(
    spec: SweepSpec,
    run: RunDirectory,
    rows: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
    conclusion: Conclusion,
) -> None:
    """Write the model card of a concluded run."""
    (run.best / "README.md").write_text(model_card(spec, rows, best, conclusion), encoding="utf-8")


def model_card(
    spec: SweepSpec, rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any], conclusion: Conclusion
) -> str:
    """The card: what the adapter is, what it reached, how it was found."""
    states = {state: sum(row["state"] == state for row in rows) for state in ("completed", "stopped", "failed")}
    quantised = "4-bit NF4 with double quantisation" if spec.base.quantization == "nf4" else "unquantised"
    ranked = ranked_rows(rows, spec.search.metric, spec.search.mode)
    settings = [column(name) for name in spec.search.space if column(name) in best]
    return "\n".join(
        [
            "---",
            yaml.safe_dump({"base_model": spec.base.model}, width=10**9).rstrip(),
            "library_name: peft",
            "tags: [lora, lora-search]",
            "---",
            "",
            f"# {spec.name}: the best of {len(rows)} trials",
            "",
            f"A LoRA adapter for `{spec.base.model}` ({quantised} while training), found by lora-search on "
            f"`{spec.data.path}`.",
            "",
            "| | loss, nats a token | untrained base |",
            "| --- | --- | --- |",
            f"| validation | {conclusion.validation_loss:.4f} | {conclusion.untrained_validation_loss:.4f} |",
            f"| test, touched once [95 % interval] | {conclusion.test_loss:.4f}{interval(conclusion)} "
            f"| {conclusion.untrained_test_loss:.4f} |",
            f"| merged model, validation | {merged_loss(conclusion)} | |",
            "",
            merge_line(conclusion),
            "",
            "## Configuration",
            "",
            "| parameter | value |",
            "| --- | --- |",
            *(
                f"| {name} | {_value(best[name])} |"
                for name in dict.fromkeys(["rank", "alpha", "dropout", "target_modules", "learning_rate", *settings])
            ),
            f"| steps | {best['steps']} |",
            f"| trainable parameters | {best['trainable_parameters']:,} |",
            "",
            "`config.yaml` beside this page is a sweep of this one configuration: `lora-search run config.yaml`.",
            "",
            "## Search",
            "",
            f"{spec.search.sampler.name} proposed {len(rows)} configurations; {states['completed']} were trained to "
            f"the end, {states['stopped']} stopped early by {spec.search.scheduler.name}, {states['failed']} failed. "
            f"The best by {spec.search.metric}:",
            "",
            f"| trial | state | steps | {spec.search.metric} | {' | '.join(settings)} |",
            f"| --- | --- | --- | --- | {' | '.join('---' for _ in settings)} |",
            *(
                f"| {row['trial']} | {row['state']} | {row['steps']} | {row[spec.search.metric]:.4f} | "
                f"{' | '.join(_value(row[name]) for name in settings)} |"
                for row in ranked[:SHOWN]
            ),
            "",
            "## Use",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("merged")  # or PeftModel.from_pretrained(base, "adapter")',
            'tokenizer = AutoTokenizer.from_pretrained("merged")',
            "```",
            "",
        ]
    )


def merge_line(conclusion: Conclusion) -> str:
    """What was merged onto which weights, and what it cost; loud where it cost more than the tolerance."""
    if conclusion.merged_loss is None or conclusion.merge_drift is None:
        return (
            f"WARNING: merged onto the {conclusion.merged_onto} weights shard by shard and NOT verified: "
            f"{conclusion.merge_unverified}."
        )
    ways = ", ".join(f"{way} weights {loss:.4f}" for way, loss in conclusion.merge_losses.items())
    line = (
        f"Merged onto the {conclusion.merged_onto} weights: validation loss {conclusion.merged_loss:.4f}, "
        f"{signed(conclusion.merge_drift)} from the adapter's (measured: {ways})."
    )
    if conclusion.merge_within_tolerance:
        return line
    return f"WARNING: the merged model differs from the adapter by more than 1 %. {line}"


def interval(conclusion: Conclusion) -> str:
    """The test loss's confidence interval, as it stands behind the loss."""
    if conclusion.test_loss_interval is None:
        return ""
    low, high = conclusion.test_loss_interval
    return f" [{low:.4f}, {high:.4f}]"


def merged_loss(conclusion: Conclusion) -> str:
    """The merged model's validation loss, as a table shows it."""
    return "not measured" if conclusion.merged_loss is None else f"{conclusion.merged_loss:.4f}"


def signed(share: float) -> str:
    """A relative difference, one that rounds to nothing without a sign."""
    return f"{share:+.2%}" if abs(share) >= 5e-5 else "0.00%"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return cell(", ".join(value) if isinstance(value, list) else str(value))
