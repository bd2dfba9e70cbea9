"""`lora-search plan`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lora_search.imports import import_libraries
from lora_search.memory.values import RULE_WIDTH
from lora_search.space import STARTUP_TRIALS
from lora_search.spec import load_spec

if TYPE_CHECKING:
    from lora_search.memory.familiar import Familiar
    from lora_search.plan import Plan
    from lora_search.plan.schedule import Schedule


WIDTH = 100
"""Columns where nobody says how wide the page is."""


def plan(sweep: str, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print what a sweep will cost."""
    spec = load_spec(sweep, overrides)
    with redirect_stdout(sys.stderr):  # standard output is ours; libraries may print
        import_libraries()  # only now: a wrong sweep file has been told of
        from lora_search.plan import plan_sweep, usual_ways

        found, familiar = plan_sweep(spec), usual_ways(spec)
    if as_json:
        print(json.dumps(asdict(found) | {"familiar": [asdict(way) for way in familiar]}, indent=2))
    else:
        _print(found, familiar)


def _print(plan: Plan, familiar: Sequence[Familiar]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(f"{plan.name}: {plan.model}, {plan.architecture}", style="bold", markup=False)
    console.print(f"\nThe base: {plan.parameters:,} parameters", style="italic")
    console.print(_base(plan))
    batches = " to ".join(str(size) for size in sorted({corner.batch_size for corner in plan.corners}))
    rows = f"batches of {batches} x {plan.rows.longest} tokens"
    console.print(f"\nWhat a trial adds, {rows}, on {plan.corner_device}", style="italic")
    console.print(_corners(plan))
    one = "one device" if plan.gpus_per_host == 1 else f"{plan.gpus_per_host} GPUs of one host"
    console.print(f"\nTrials that fit together on {one}, without and with base.gradient_checkpointing", style="italic")
    console.print(_devices(plan))
    for line in (*_unfit(plan), *([f"Careful: {plan.advice}."] if plan.advice else [])):
        console.print(line, style="bold red", markup=False)
    console.print("\nThe sweep", style="italic")
    console.print(_sweep(plan))
    console.print("\nThis base as it is usually compared: rank 16 on attention, half precision", style="italic")
    console.print(_familiar(familiar))
    console.print("\nAssumed", style="italic")
    for line in _assumptions(plan):
        console.print(f"- {line}", markup=False)


def _base(plan: Plan) -> Table:
    table = Table()
    table.add_column("bytes by part")
    for base in plan.bases:
        table.add_column(f"{base.device}:\n{base.compute} products", justify="right")
    weights = [base.weights for base in plan.bases]
    if plan.quantization == "nf4":
        numbers = f"{weights[0].quantised_parameters:,} parameters"
        table.add_row(f"4-bit weights ({numbers})", *(_size(w.packed) for w in weights))
        table.add_row("their scales, double-quantised", *(_size(w.constants) for w in weights))
    rest = "embeddings, head, norms and biases" if plan.quantization == "nf4" else "all weights"
    table.add_row(rest, *(_size(w.unquantised) for w in weights))
    table.add_row("together", *(_size(w.total) for w in weights), style="bold")
    if any(w.head_copy for w in weights):
        table.add_row("output head once more, during a pass", *(_size(w.head_copy) for w in weights))
    return table


def _corners(plan: Plan) -> Table:
    table = Table()
    table.add_column("target set", overflow="fold", min_width=12)
    table.add_column("trial")
    table.add_column("trainable\nparameters", justify="right")
    for name in ("weights", "gradient", "Adam", "activa-\ntions", "recom-\nputed"):
        table.add_column(name, justify="right", min_width=7)
    previous = None
    for corner in plan.corners:
        if previous is not None and corner.target_modules != previous:
            table.add_section()
        sizes = (corner.bytes.adapter, corner.bytes.gradient, corner.bytes.optimizer)
        table.add_row(
            corner.target_modules if corner.target_modules != previous else "",
            f"{corner.size}, r={corner.rank}",
            f"{corner.bytes.trainable:,}",
            *map(_size, sizes),
            _size(corner.bytes.activations + corner.bytes.passing),
            _size(corner.recomputed),
        )
        previous = corner.target_modules
    return table


def _devices(plan: Plan) -> Table:
    table = Table()
    table.add_column("device", overflow="fold")
    for name in ("memory", "products"):
        table.add_column(name, justify="right")
    for name in (
        "smallest\ntrials",
        "largest\ntrials",
        "smallest,\nrecomputed",
        "largest,\nrecomputed",
        "sweep on\none",
    ):
        table.add_column(name, justify="right")
    for device in plan.devices:
        table.add_row(
            device.name,
            f"{device.memory / 2**30:.0f} GiB",
            device.compute,
            *(
                _count(count)
                for count in (
                    device.smallest,
                    device.largest,
                    device.smallest_recomputed,
                    device.largest_recomputed,
                )
            ),
            "-" if device.never else duration(device.seconds),
            style="bold" if device.here else "dim" if device.never else "",
        )
        if device.here:
            table.add_section()
    return table


def _sweep(plan: Plan) -> Table:
    sweep, steps = plan.sweep, plan.sweep.schedule
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("trials", f"{steps.trials:,}")
    table.add_row("optimiser steps", _steps(steps))
    table.add_row("training tokens", f"{_big(sweep.train_tokens)} expected, {_big(sweep.train_tokens_most)} at most")
    table.add_row("evaluation tokens", f"{_big(sweep.evaluation_tokens)}, in {steps.reports:,} reports")
    if sweep.epochs is not None:
        table.add_row("longest trial", f"{sweep.epochs:.2g} epochs of {plan.rows.train_rows:,} rows")
    table.add_row("operations", f"{_flops(sweep.flops)} expected, {_flops(sweep.flops_most)} at most")
    hosts = f"{plan.hosts} host{'s' * (plan.hosts > 1)} of {plan.trials_per_host} trials"
    table.add_row(
        "efficiency",
        f"{steps.efficiency:.0%} of the time of {steps.seats} seats ({hosts}) is filled; "
        f"for {steps.alone:.0%} of it the last trial is alone",
    )
    here = next(device for device in plan.devices if device.here)
    table.add_row("duration here", "-" if here.never else f"about {duration(here.seconds)}")
    return table


def _steps(steps: Schedule) -> str:
    expected = f"{steps.expected:,} expected"
    if steps.low < steps.high:
        expected += f", {steps.low:,} to {steps.high:,} in nine of ten simulated sweeps"
    if steps.unlearned != steps.expected:
        expected += f"; {steps.unlearned:,} if the sampler learns nothing"
    return f"{expected}; {steps.fewest:,} if each stops at its first rung, {steps.most:,} if none stops"


def _familiar(ways: Sequence[Familiar]) -> Table:
    table = Table()
    table.add_column("one training on a GPU")
    for name in ("rows of\n256 tokens", "rows of\n512 tokens", "512 tokens,\nrecomputed"):
        table.add_column(name, justify="right")
    for row in ways:
        table.add_row(row.way, *map(_size, (row.short, row.long, row.recomputed)))
    return table


def _unfit(plan: Plan) -> Iterator[str]:
    setting = "as the sweep file says" if plan.checkpointing else "base.gradient_checkpointing: true"
    needs = [device.name for device in plan.devices if device.needs_checkpointing]
    never = [device.name for device in plan.devices if device.never]
    if needs:
        yield f"The largest trial fits with recomputed activations alone ({setting}) on: {', '.join(needs)}."
    if plan.refused:
        yield f"Here: {plan.refused}."
        never = [device.name for device in plan.devices if device.never and not device.here]
    if never:
        yield f"The largest trial fits in no way on: {', '.join(never)}."


def _assumptions(plan: Plan) -> Iterator[str]:
    rows = plan.rows
    if rows.measured:
        yield (
            f"Rows as in the data: {rows.mean:.0f} tokens on average, {rows.longest} the longest, {rows.targets:.0%} "
            "of them counted by the loss. Memory is for batches of longest rows."
        )
    else:
        yield (
            f"Every row has data.max_length = {rows.longest} tokens and every token counts, with 100 validation rows: "
            f"{rows.reason}."
        )
    if plan.by_rule:
        less, more = RULE_WIDTH
        yield (
            f"Activations are by a rule of thumb, for the code of {plan.architecture} does not run on shapes alone: "
            f"they may be {less:g} to {more:g} times what stands here, which decides what fits."
        )
    if plan.quantization == "nf4":
        yield "What NF4 leaves out is held in float32, as peft.prepare_model_for_kbit_training does: 4 bytes a number."
    yield (
        "A trial holds float32 weights, gradient and two moments: 16 bytes a trainable parameter, 18 where products "
        "are in half precision. A layer that one trial of a pack adapts keeps its input for all of them."
    )
    yield (
        "Logits are never all there at once, and packs hold no padding. Evaluation takes up to 32,768 tokens a pass on "
        "a GPU, 4,096 on a CPU; it is in what fits."
    )
    if plan.gpus_per_host > 1:
        yield (
            f"A host's {plan.gpus_per_host} GPUs share the base's layers, and the fullest decides what fits; they work "
            "in turn, so that such a host is as fast as one GPU."
        )
    yield (
        "A GPU keeps 0.5 GiB for its context and 4 % for gaps; a process on a CPU starts at 0.6 GB, and its heap takes "
        "1.35 bytes for each byte in use."
    )
    if plan.sweep.schedule.fewest < plan.sweep.schedule.most:
        yield (
            "Steps are of simulated sweeps: a trial's quality is one random number at all rungs, and ASHA stops it by "
            "the results that were there before it, so that early trials go on. TPE is taken to propose from the best "
            f"tenth of the space once {STARTUP_TRIALS} trials have ended."
        )
    yield (
        "A GPU reaches 35 % of its makers' dense rate, a CPU 35 % of what a quarter-second product reaches now; a GPU "
        "other than this machine's is taken as filled."
    )


def _count(count: int) -> str:
    return "[red]0[/red]" if count == 0 else "512+" if count >= 512 else str(count)


def _size(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 100 * scale else f"{size / scale:.0f} {unit}"
    return f"{size:.0f} B"


def _big(count: float) -> str:
    for word, scale in (("billion", 1e9), ("million", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {word}"
    return f"{count:,.0f}"


def _flops(flops: float) -> str:
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= scale:
            return f"{flops / scale:.3g} {unit}"
    return f"{flops / 1e9:.3g} GFLOP"


def duration(seconds: float) -> str:
    """A span of time, as people say it."""
    if seconds < 90:
        return f"{max(1, seconds):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:.1f} days"
