"""`lora-search targets`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from lora_search.targets import RANKS, TargetTable, module_tree, skeleton, target_table


def targets(model: str, *, as_json: bool) -> None:
    """Print a model's linear modules and the target sets they make."""
    table = target_table(model, module_tree(skeleton(model)))
    if as_json:
        print(json.dumps(asdict(table), indent=2))
    else:
        _print(table)


def _print(table: TargetTable) -> None:
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(
        f"{table.model}: {table.architecture}, {table.total_parameters:,} parameters", style="bold", highlight=False
    )
    modules = Table(title="Linear modules", title_justify="left")
    for name in ("module", "kind", "part of", "shape (out x in)"):
        modules.add_column(name)
    modules.add_column("count", justify="right")
    for row in table.modules:
        modules.add_row(row.suffix, row.kind, row.role, "\n".join(row.shapes), str(row.count))
    console.print(modules)
    left = [f"the output head ({table.head})"] if table.head else []
    left += [f"{table.routers} routers"] if table.routers else []
    if left:
        console.print(f"Never adapted: {' and '.join(left)}.", highlight=False)
    sets = Table(title="Trainable parameters by target set and rank", title_justify="left")
    sets.add_column("target set")
    for rank in RANKS:
        sets.add_column(f"rank {rank}", justify="right")
    for group in table.sets:
        if group.unavailable:
            sets.add_row(group.name, f"[dim]{group.unavailable}[/dim]")
        else:
            sizes = [f"{count:,}\n[dim]{table.share(count):.3%}[/dim]" for count in group.trainable.values()]
            sets.add_row(f"{group.name}\n[dim]{', '.join(group.suffixes)}[/dim]", *sizes)
    console.print(sets)
