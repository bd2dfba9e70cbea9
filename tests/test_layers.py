"""The house's floors: imports run downwards only, and the engine knows nothing of Ray, Optuna or W&B."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lora_search"

FLOORS = {
    "errors": 0,
    "builtin": 0,
    "spec": 0,
    "imports": 1,
    "journal": 1,
    "machine": 1,
    "rundir": 1,
    "job": 1,
    "lease": 1,
    "checkpoint": 1,
    "storage": 1,
    "versions": 1,
    "space": 1,
    "targets": 1,
    "logits": 1,
    "positions": 1,
    "memory": 1,
    "model": 2,
    "data": 2,
    "engine": 3,
    "waiting": 1,
    "thread": 1,
    "placement": 1,
    "host": 4,
    "seat": 4,
    "search": 4,
    "tracking": 4,
    "results": 4,
    "merge": 4,
    "best": 4,
    "plan": 4,
    "export": 4,
    "serve": 4,
    "report": 4,
    "launch": 5,
    "sweep": 5,
    "doctor": 5,
    "cli": 6,
    "__main__": 7,
}

FORBIDDEN = {
    "spec": {"ray", "torch", "optuna", "wandb", "transformers", "pandas"},
    "engine": {"ray", "optuna", "wandb"},
    "model": {"ray", "optuna", "wandb"},
    "data": {"ray", "optuna", "wandb"},
    "placement": {"ray", "torch"},
    "seat": {"torch", "transformers", "peft"},
    "host": {"ray", "torch"},
    "results": {"ray", "torch"},
    "report": {"ray", "torch"},
    "merge": {"ray"},
    "best": {"ray"},
    "export": {"ray", "torch"},
    "serve": {"ray", "wandb"},
    "memory": {"ray", "optuna", "wandb"},
    "plan": {"ray", "optuna", "wandb"},
}


def imports(file: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "lora_search"}
    return names


def room(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_downwards(file: Path) -> None:
    here = room(file)
    assert here in FLOORS, f"{here} stands on no floor yet: say in FLOORS which"
    for name in imports(file):
        if name.startswith("lora_search."):
            there = name.split(".")[1]
            if there in FLOORS and there != here:
                assert FLOORS[there] <= FLOORS[here], f"{here} (floor {FLOORS[here]}) imports {there}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_room_keeps_to_its_libraries(file: Path) -> None:
    used = {name.split(".")[0] for name in imports(file)}
    assert not used & FORBIDDEN.get(room(file), set())


def test_rooms_on_one_floor_make_no_circle() -> None:
    edges: dict[str, set[str]] = {}
    for file in FILES:
        below = {name.split(".")[1] for name in imports(file) if name.startswith("lora_search.")}
        edges.setdefault(room(file), set()).update(below - {room(file)})
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if name not in done:
            for below in edges.get(name, ()):
                visit(below, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lora_search.spec", ["torch", "ray", "optuna", "transformers", "pandas"]),
        ("lora_search.cli", ["torch", "ray", "optuna", "transformers", "pandas"]),
        ("lora_search.seat", ["torch", "transformers", "peft", "pandas", "pyarrow", "optuna", "ray.tune"]),
        ("lora_search.host", ["torch", "ray"]),
        ("lora_search.results", ["torch", "ray"]),
        ("lora_search.report", ["torch", "ray"]),
        ("lora_search.memory", ["torch", "ray", "transformers", "peft"]),
        ("lora_search.plan", ["torch", "ray", "transformers", "peft"]),
        ("lora_search.engine", ["ray", "optuna", "wandb"]),
        ("lora_search.best", ["ray"]),
        ("lora_search.export", ["ray", "torch", "transformers", "peft", "optuna", "wandb"]),
        ("lora_search.serve", ["ray", "torch"]),
    ],
)
def test_importing_a_room_leaves_out(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
