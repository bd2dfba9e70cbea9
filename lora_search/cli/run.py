"""`lora-search run`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_search.errors import harmless
from lora_search.imports import uncollected
from lora_search.job import cluster_address, lasting, refuse_passing_output, scheduled_job
from lora_search.rundir import create_run, newest_run, newest_run_of_job
from lora_search.space import planned_trials
from lora_search.spec import load_spec
from lora_search.sweep.signals import sigterm_as_sigint

if TYPE_CHECKING:
    from lora_search.spec import SweepSpec
    from lora_search.sweep.run import Outcome


def run(sweep: str, overrides: Sequence[str], *, name: str | None, address: str | None, resume: bool) -> None:
    """Check the sweep file, then run it, showing its progress on standard error and its result on standard output.

    In a scheduler's job that was started again, go on with the run that it has begun or resumed.

    Args:
        resume: go on with the newest run of that name, where there is one.
    """
    with sigterm_as_sigint():
        _run(sweep, overrides, name, address, resume)


def _run(sweep: str, overrides: Sequence[str], name: str | None, address: str | None, resume: bool) -> None:
    # As JSON, which is YAML too: 42 and 2026-11-24 are names, not a number and a date.
    spec = load_spec(sweep, [*overrides, *([f"name={json.dumps(name)}"] if name else [])])
    refuse_passing_output(spec.output)
    cluster, said_by = cluster_address(address)
    exact, job = name is not None, scheduled_job()
    left = newest_run_of_job(spec.output, spec.name, job, exact=exact) if job else None
    if job and left:
        print(f"lora-search: going on with {left.place}, the run of this job ({harmless(job)})", file=sys.stderr)
    elif resume:
        left = newest_run(spec.output, spec.name, exact=exact)
    if resume and left is None:
        print(f"lora-search: {spec.output} has no run named {spec.name} to resume; starting one", file=sys.stderr)
    directory = left or create_run(spec.output, spec.name, exact=exact)
    print(f"lora-search: {spec.name} -> {directory.place}", file=sys.stderr)
    if cluster is not None and address is None:
        print(f"lora-search: on the Ray cluster {cluster} ({said_by})", file=sys.stderr)
    if passing := _passing(spec):
        print(
            f"lora-search: WARNING: {' and '.join(passing)} lie in the job's copy of its working directory, where "
            "merge, serve and export will not find them when Ray has removed it",
            file=sys.stderr,
        )
    # Only now: Ray and Optuna take seconds to import, and a wrong sweep file has been told of by now.
    with uncollected():
        from lora_search.sweep.run import run_sweep
        from lora_search.tracking.live import LiveView
        from lora_search.tracking.wandb import WandbRuns

    view = LiveView(spec.name, planned_trials(spec), spec.max_steps, spec.search.metric, spec.search.mode)
    with view:
        runs = WandbRuns(spec.tracking.wandb, directory.name, directory.path, spec.model_dump(mode="json"), view.say)
        outcome = run_sweep(spec, directory, [runs, view], address=cluster, resume=left is not None, say=view.say)
    _show(spec, outcome)


def _passing(spec: SweepSpec) -> list[str]:
    """Keys of what is used again after the sweep, and is lost with a job."""
    used = {"base.model": spec.base.model, "data.path": spec.data.path}
    return [key for key, value in used.items() if lasting(value) != value]


def _show(spec: SweepSpec, outcome: Outcome) -> None:
    from rich.console import Console
    from rich.table import Table

    from lora_search.best import interval, merge_line, merged_loss

    best, conclusion, run = outcome.best, outcome.conclusion, outcome.run
    table = Table(title=f"{spec.name}: trial {best['trial']} is the best of {len(outcome.rows)}", title_justify="left")
    table.add_column("loss, nats a token")
    table.add_column("untrained base", justify="right")
    table.add_column("best adapter", justify="right")
    table.add_column("merged model", justify="right")
    table.add_row(
        "validation",
        f"{conclusion.untrained_validation_loss:.4f}",
        f"{conclusion.validation_loss:.4f}",
        merged_loss(conclusion),
    )
    tested = f"{conclusion.test_loss:.4f}{interval(conclusion)}"
    table.add_row("test [95 %]", f"{conclusion.untrained_test_loss:.4f}", tested, "")
    settings = ", ".join(
        f"{name} {best[name]:.3g}" if isinstance(best[name], float) else f"{name} {best[name]}"
        for name in ("rank", "alpha", "dropout", "target_modules", "learning_rate")
    )
    place = (run.uri or str(run.path)).partition("?")[0]
    folder = f"{place}/best"
    console = Console()
    console.print()
    console.print(table)
    console.print(f"Best configuration: {harmless(settings)}", highlight=False, markup=False)
    merged = merge_line(conclusion)
    console.print(merged, style="bold red" if merged.startswith("WARNING") else "")
    pages = f"  {place}/report.html         every trial, in charts: open it in a browser\n" * run.report.is_file()
    console.print(
        f"\n{pages}"
        f"  {folder}/README.md      what was found, and how\n"
        f"  {folder}/adapter        the adapter, for PEFT\n"
        f"  {folder}/merged         the merged model, for transformers alone\n"
        f"\n  lora-search results {shlex.quote(run.place)}",
        highlight=False,
        soft_wrap=True,
    )
