"""Tracking: the run directory's record, Weights & Biases, and what a person sees while a sweep runs."""

from lora_search.tracking.events import Observer, State
from lora_search.tracking.record import RunRecord

__all__ = ["Observer", "RunRecord", "State"]
