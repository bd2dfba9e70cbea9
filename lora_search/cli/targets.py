"""`lora-search targets`."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from lora_search.targets import RANKS, TargetTable, module_tree, skeleton, target_table


def targets(model: str, *, as_json: bool) -> None:
    """Print a model's linear modules and the target sets they make."""
    with redirect_stdout(sys.stderr):  # standard output is ours; libraries may print
        table = target_table(model, module_tree(skeleton(model)))
    if as_json:
        print(json.dumps(asdict(table), indent=2))
    else:
        _print(table)


def _print(table: TargetTable) -> None:
    console = Console(highlight=False)
    title = f"{table.model}: {table.architecture}, {table.total_parameters:,} parameters"
    console.print(title, style="bold", markup=False)
    console.print("\nLinear modules", style="italic")
    console.print(_modules(table))
    for line in _left_out(table):
        console.print(line)
    console.print("\nTarget sets", style="italic")
    console.print(_sets(table))
    console.print("\nTrainable parameters, and their share of the base's", style="italic")
    console.print(_sizes(table))


def _modules(table: TargetTable) -> Table:
    modules = Table()
    modules.add_column("module", overflow="fold")
    for name in ("kind", "part of"):
        modules.add_column(name)
    for name in ("shape (out x in)", "count"):
        modules.add_column(name, justify="right")
    for row in table.modules:
        modules.add_row(row.suffix, row.kind, row.role, "\n".join(row.shapes), str(row.count))
    return modules


def _left_out(table: TargetTable) -> list[str]:
    never = [f"the output head ({table.head})"] if table.head else []
    never += [f"{table.routers} routers"] if table.routers else []
    lines = [f"Never adapted: {' and '.join(never)}."] if never else []
    if table.refused:
        lines.append(f"PEFT does not adapt these linear modules of this architecture: {', '.join(table.refused)}.")
    if any(row.role == "tower" for row in table.modules):
        lines.append("In no target set: towers, which text does not pass through.")
    return lines


def _sets(table: TargetTable) -> Table:
    sets = Table()
    sets.add_column("target set", no_wrap=True)
    sets.add_column("modules", justify="right")
    sets.add_column("named", overflow="fold")
    for row in table.sets:
        if row.unavailable:
            sets.add_row(row.name, "-", f"not available: {row.unavailable}", style="dim")
        else:
            sets.add_row(row.name, str(row.modules), ", ".join(row.suffixes))
    return sets


def _sizes(table: TargetTable) -> Table:
    sizes = Table()
    sizes.add_column("rank", justify="right")
    available = [row for row in table.sets if not row.unavailable]
    for row in available:
        sizes.add_column(row.name, justify="right")
    for rank in RANKS:
        sizes.add_row(str(rank), *(f"{row.trainable[rank]:,}\n[dim]{row.share[rank]:.3%}[/dim]" for row in available))
    return sizes
