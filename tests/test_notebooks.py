"""The notebooks of analysis/: each runs from top to bottom on a run made here; every plot says its units."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import numpy as np
import pytest
from conftest import PATIENCE, ROOT, SHARED
from nbclient import NotebookClient

from lora_search.rundir import RunDirectory
from lora_search.spec import Choice, LogUniform, Uniform, parse_spec

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOKS = sorted((ROOT / "analysis").glob("*.ipynb"))

KEEP_FIGURES = """
from matplotlib.figure import Figure as _Figure
_figures, _made = [], _Figure.__init__
def _kept(self, *arguments, **options):
    _figures.append(self)
    _made(self, *arguments, **options)
_Figure.__init__ = _kept
"""

UNLABELLED = """
_axes = [(axes, figure) for figure in _figures for axes in figure.axes]
print("FIGURES", len(_figures))
for _each, _figure in _axes:
    _bar = getattr(_each, "_colorbar", None)
    if _bar is None and not (_each.get_xlabel() and _each.get_ylabel()):
        print("UNLABELLED", _each.get_title(), repr(_each.get_xlabel()), repr(_each.get_ylabel()))
    if _bar is not None and not (_each.get_xlabel() or _each.get_ylabel()):
        print("UNLABELLED colour bar")
"""


@pytest.fixture(scope="module")
def run(demo_folder: Path) -> Path:
    """A finished run of twelve trials over the usual parameters."""
    return demo_folder / "runs" / "demo"


def execute(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **environment: Any) -> NotebookNode:
    """The notebook with its outputs, run as a user would, between cells that watch its figures."""
    for key, value in {"OMP_NUM_THREADS": "1", **environment}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "analysis" / f"{name}.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(KEEP_FIGURES))
    notebook.cells.append(nbformat.v4.new_code_cell(UNLABELLED))
    NotebookClient(
        notebook, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def printed(cell: NotebookNode) -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout")


def require_labels(notebook: NotebookNode, figures: int) -> None:
    last = printed(notebook.cells[-1])
    assert "UNLABELLED" not in last, last
    assert int(re.findall(r"FIGURES (\d+)", last)[0]) == figures
    shown = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(shown) == figures


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_is_kept_without_outputs(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert [c for c in notebook.cells if c.cell_type == "code" and (c.outputs or c.execution_count)] == []


def test_there_are_four_notebooks() -> None:
    assert [file.stem for file in NOTEBOOKS] == ["compare_sweeps", "deploy_best", "explore_sweep", "what_mattered"]


def test_sweep_is_explored(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = execute("explore_sweep", tmp_path, monkeypatch, LORA_SEARCH_RUN=run)
    require_labels(notebook, figures=6)
    assert "12 of 12 trials have begun" in "".join(printed(cell) for cell in notebook.cells if "outputs" in cell)


def test_sweeps_are_compared(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run, the run as it was after half of its record, and published experiments of another metric."""
    copy = tmp_path / "half"
    copy.mkdir()
    (copy / "sweep.yaml").write_bytes((run / "sweep.yaml").read_bytes())
    lines = (run / "trials.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "trials.jsonl").write_bytes(b"".join(lines[: 2 * len(lines) // 3]))
    published = SHARED / "peft-method-comparison"
    places = os.pathsep.join(map(str, [run, copy, *([published] if published.exists() else [])]))
    notebook = execute("compare_sweeps", tmp_path, monkeypatch, LORA_SEARCH_RUNS=places)
    require_labels(notebook, figures=8 if published.exists() else 4)
    told = "".join(printed(cell) for cell in notebook.cells if "outputs" in cell)
    assert "judged by eval_loss: demo, half" in told
    assert ("judged by accuracy: peft-method-comparison" in told) == published.exists()


def test_what_mattered_ends_in_a_sweep_that_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = execute("what_mattered", tmp_path, monkeypatch, LORA_SEARCH_RUN=run)
    require_labels(notebook, figures=3)
    spec = parse_spec(printed(notebook.cells[-2]), source="next.yaml", folder=tmp_path)
    before = parse_spec((run / "sweep.yaml").read_text(), source="sweep.yaml", folder=tmp_path)
    assert spec.name == "demo-next"
    assert spec.search.space.keys() == before.search.space.keys()
    assert spec.search.space != before.search.space
    rate = spec.search.space["learning_rate"]
    assert isinstance(rate, LogUniform)
    assert rate.high <= 3.01e-2
    assert spec.search.enqueue, "the best trial is tried first"


def test_effects_of_a_made_up_law_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss 10 % lower a doubling of the rank, 20 % lower on all linear modules, a valley over the learning rate.

    The learning rate goes with the rank, so that the rank alone looks worse than it is.
    """
    folder, draw = tmp_path / "law", random.Random(0)
    folder.mkdir()
    space = {
        "rank": Choice((4, 8, 16, 32)),
        "target_modules": Choice(("attention-qv", "all-linear")),
        "learning_rate": LogUniform(1e-4, 1e-1),
        "dropout": Uniform(0.0, 0.1),
        "weight_decay": Uniform(0.0, 0.1),
    }
    scheduler = {"first_rung": 10}
    raw = {"name": "law", "search": {"space": {n: d.plain() for n, d in space.items()}, "scheduler": scheduler}}
    (folder / "sweep.yaml").write_text(json.dumps(raw))
    events: list[dict[str, Any]] = []
    for trial in range(40):
        rank, target = draw.choice([4, 8, 16, 32]), draw.choice(["attention-qv", "all-linear"])
        rate = 10 ** (-2 + 0.4 * (np.log2(rank) - 3.5) + draw.uniform(-0.8, 0.8))  # far above the best rate: 1e-3
        loss = 3 * 0.9 ** np.log2(rank) * (0.8 if target == "all-linear" else 1.0)
        loss *= np.exp(0.15 * (np.log10(rate) + 3) ** 2 + draw.gauss(0, 0.02))
        sampled = {"rank": rank, "alpha": 2.0 * rank, "target_modules": target, "learning_rate": float(rate)}
        sampled |= {"dropout": draw.uniform(0, 0.1), "weight_decay": draw.uniform(0, 0.1)}
        events.append({"event": "start", "trial": trial, "time": 1e9 + trial, "parameters": sampled})
        report = {"step": 10, "steps_total": 90, "eval_loss": float(loss), "train_loss": float(loss)}
        events.append({"event": "report", "trial": trial, "time": 1e9 + trial + 0.5, **report})
        events.append({"event": "end", "trial": trial, "time": 1e9 + trial + 0.6, "state": "stopped", "reason": None})
    (folder / "trials.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    notebook = nbformat.read(ROOT / "analysis" / "what_mattered.ipynb", as_version=4)
    ask = (
        'print("EFFECTS", {n: [round(float(shown(v)), 2) for v in row] for n, row in zip(held.index, held.to_numpy())})'
    )
    ask += '\nprint("ALONE", round(float(shown(alone.loc["rank: doubled", "effect"])), 2))'
    notebook.cells.append(nbformat.v4.new_code_cell(ask))
    monkeypatch.setenv("LORA_SEARCH_RUN", str(folder))
    NotebookClient(
        notebook, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    told = printed(notebook.cells[-1])
    effects = dict(re.findall(r"'([^']+)': \[([^]]+)\]", told))
    for name, truth in {
        "rank: doubled": -10.0,
        "target_modules: attention-qv for all-linear": 25.0,
        "dropout: + 0.1": 0.0,
    }.items():
        estimate, low, high = map(float, effects[name].split(","))
        assert low - 1 <= truth <= high + 1, (name, effects[name])
        assert abs(estimate - truth) < 4
    assert float(re.findall(r"ALONE (\S+)", told)[0]) > -5, "confounded by the learning rate, it looks far smaller"


def test_best_trial_is_deployed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = execute("deploy_best", tmp_path, monkeypatch, LORA_SEARCH_RUN=run)
    require_labels(notebook, figures=1)
    told = "".join(printed(cell) for cell in notebook.cells if "outputs" in cell)
    assert "same tokenizer: True" in told
    same, of = map(int, re.findall(r"as the adapter does on (\d+) of (\d+)", told)[0])
    assert same >= of - 1, "the merged model answers as the adapter does"
    assert RunDirectory(run).best.is_dir()


@pytest.mark.slow
def test_run_without_a_merged_model_is_merged_by_the_notebook(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "unmerged"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("best"))
    out = tmp_path / "merged"
    execute("deploy_best", tmp_path, monkeypatch, LORA_SEARCH_RUN=copy, LORA_SEARCH_MERGED=out)
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("name", ["explore_sweep", "what_mattered"])
def test_running_sweep_of_few_trials_is_no_error(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "begun"
    copy.mkdir()
    (copy / "sweep.yaml").write_bytes((run / "sweep.yaml").read_bytes())
    lines = (run / "trials.jsonl").read_bytes().splitlines(keepends=True)
    reports = [number for number, line in enumerate(lines) if b'"report"' in line]
    (copy / "trials.jsonl").write_bytes(b"".join(lines[: reports[1] + 1]))
    notebook = execute(name, tmp_path, monkeypatch, LORA_SEARCH_RUN=copy)
    assert "UNLABELLED" not in printed(notebook.cells[-1])
