"""Orchestration: places the hosts, runs the search through Ray Tune, and concludes it."""

from lora_search.sweep.run import Outcome, run_sweep

__all__ = ["Outcome", "run_sweep"]
