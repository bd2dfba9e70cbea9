"""Target sets: which of a model's modules an adapter is put on, resolved against the real module tree."""

from lora_search.spec import TARGET_SETS
from lora_search.targets.resolve import Targets, resolve, trainable_parameters
from lora_search.targets.sets import available_sets
from lora_search.targets.skeleton import skeleton
from lora_search.targets.table import RANKS, SetRow, SuffixRow, TargetTable, target_table
from lora_search.targets.tree import LinearModule, ModuleTree, experts_per_token, module_tree

__all__ = [
    "RANKS",
    "TARGET_SETS",
    "LinearModule",
    "ModuleTree",
    "SetRow",
    "SuffixRow",
    "TargetTable",
    "Targets",
    "available_sets",
    "experts_per_token",
    "module_tree",
    "resolve",
    "skeleton",
    "target_table",
    "trainable_parameters",
]
