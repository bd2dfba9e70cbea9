"""What PEFT does not adapt, whatever it is asked."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def refused_names(model: PreTrainedModel, names: AbstractSet[str]) -> frozenset[str]:
    """Those of the modules' last names that PEFT does not put LoRA on in a model of this type.

    PEFT 0.21 raises for `out_proj` in Mamba's family (tuners_utils.py, _check_lora_target_modules_mamba). In some
    mixtures of experts it takes `gate_proj`, `up_proj` and `down_proj`, wherever they stand, for the experts of an
    adapter of transformers 4: it drops the dense module and doubles the rank of the fused experts
    (utils/transformers_weight_conversion.py, _convert_peft_config_moe). Neither list is public, so PEFT is asked.
    """
    if not _is_special(model):
        return frozenset()
    return frozenset(name for name in names if not _adapts(model, name))


def _is_special(model: PreTrainedModel) -> bool:
    """Whether PEFT might refuse anything; importing it to ask takes longer than all else here."""
    from torch import nn

    return any("expert" in name or isinstance(module, nn.Conv1d) for name, module in model.named_modules())


def _adapts(model: PreTrainedModel, name: str) -> bool:
    """Put LoRA on a model of one module, of this name and with the real configuration."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear
    from torch import nn

    block, stand_in = nn.Module(), nn.Module()
    block.add_module(name, nn.Linear(1, 1))
    stand_in.add_module("block", block)
    stand_in.config = model.config
    try:
        inject_adapter_in_model(LoraConfig(r=1, target_modules=[f"block.{name}"]), stand_in)
    except ValueError:
        return False
    return isinstance(block.get_submodule(name), Linear)
