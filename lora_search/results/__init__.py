"""Results of runs: rows, frames, Optuna's study. Never imports Ray, nor torch."""

from lora_search.results.events import read_events
from lora_search.results.frames import COLUMNS, Column, render, rows_frame
from lora_search.results.rows import (
    PLANNED,
    Row,
    ahead_row,
    best_row,
    column,
    ended_count,
    ranked_rows,
    run_rows,
    sampled,
    trial_rows,
)
from lora_search.results.run import Run, open_run
from lora_search.results.several import Runs, open_runs

__all__ = [
    "COLUMNS",
    "PLANNED",
    "Column",
    "Row",
    "Run",
    "Runs",
    "ahead_row",
    "best_row",
    "column",
    "ended_count",
    "open_run",
    "open_runs",
    "ranked_rows",
    "read_events",
    "render",
    "rows_frame",
    "run_rows",
    "sampled",
    "trial_rows",
]
