"""Predicted bytes: of a base, of a trial on it, and of a host that trains some together. Nothing is loaded or run."""

from lora_search.memory.corners import Corner, corners, largest
from lora_search.memory.estimate import BaseMemory
from lora_search.memory.refuse import refuse_what_never_fits
from lora_search.memory.values import HostBytes, Setup, TrialBytes, TrialShape, Weights
from lora_search.memory.weights import weigh

__all__ = [
    "BaseMemory",
    "Corner",
    "HostBytes",
    "Setup",
    "TrialBytes",
    "TrialShape",
    "Weights",
    "corners",
    "largest",
    "refuse_what_never_fits",
    "weigh",
]
