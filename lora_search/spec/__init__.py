"""The sweep file: its schema, its defaults, and what is said about a wrong one. Imports nothing of ours but errors."""

from lora_search.spec.domain import Choice, Domain, Fixed, IntUniform, LogUniform, Uniform
from lora_search.spec.load import dump_spec, load_spec, parse_spec, recorded_spec
from lora_search.spec.schema import (
    LORA_KEYS,
    TARGET_SETS,
    Asha,
    Base,
    Columns,
    Data,
    Hosts,
    Quantization,
    Sampler,
    Search,
    SweepSpec,
    Tracking,
    Training,
    Wandb,
)

__all__ = [
    "LORA_KEYS",
    "TARGET_SETS",
    "Asha",
    "Base",
    "Choice",
    "Columns",
    "Data",
    "Domain",
    "Fixed",
    "Hosts",
    "IntUniform",
    "LogUniform",
    "Quantization",
    "Sampler",
    "Search",
    "SweepSpec",
    "Tracking",
    "Training",
    "Uniform",
    "Wandb",
    "dump_spec",
    "load_spec",
    "parse_spec",
    "recorded_spec",
]
