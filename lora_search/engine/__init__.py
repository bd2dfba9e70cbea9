"""The engine: trains many adapters on one frozen base. Runs without Ray, in a script, a notebook or a benchmark."""

from lora_search.engine.engine import Engine
from lora_search.engine.evaluate import Evaluation, evaluate
from lora_search.engine.metrics import Report, StepMetrics

__all__ = [
    "Engine",
    "Evaluation",
    "Report",
    "StepMetrics",
    "evaluate",
]
