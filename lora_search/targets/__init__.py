"""Target sets: which of a model's modules an adapter is put on, resolved against the real module tree."""

from lora_search.targets.resolve import Targets, resolve, trainable_parameters
from lora_search.targets.table import RANKS, SetRow, SuffixRow, TargetTable, target_table
from lora_search.targets.tree import LinearModule, ModuleTree, module_tree, skeleton

__all__ = [
    "RANKS",
    "LinearModule",
    "ModuleTree",
    "SetRow",
    "SuffixRow",
    "TargetTable",
    "Targets",
    "module_tree",
    "resolve",
    "skeleton",
    "target_table",
    "trainable_parameters",
]
