"""Merge a model in memory, as PEFT does it: for what cannot be merged shard by shard."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_search.errors import InputError
from lora_search.merge.finite import require_finite
from lora_search.model.load import load_weights, quiet
from lora_search.model.precision import quantised_linears, round_trip_nf4
from lora_search.spec import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantised_modules(base: Base, device: torch.device) -> list[str]:
    """The modules that hold 4-bit weights in the quantised base, by transformers' own choice."""
    model = load_weights(base, dtype="auto", device=device)
    names = quantised_linears(model)
    del model
    gc.collect()
    return names


def merge_whole(
    base: Base, adapter: Path, quantised: Sequence[str], out: Path, dtype: torch.dtype, device: torch.device
) -> None:
    """Merge into full-precision weights, those of `quantised` modules replaced by what NF4 makes of them.

    Raises:
        InputError: the adapter changes one of two parameters that are one in the base.
        SweepError: `dtype` cannot hold a number of the merged model.
    """
    from peft import PeftModel

    # Summed in float32: in bfloat16 a small update is lost in the rounding of the weight that it is added to.
    model = load_weights(base, dtype=torch.float32, device=device, quantize=False)
    with torch.no_grad():
        for name in quantised:
            module = model.get_submodule(name)
            module.weight.copy_(_round_trip(module))
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    adapted = PeftModel.from_pretrained(model, str(adapter))
    _refuse_tied(adapted, tied)
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    for name, tensor in merged.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != dtype:
            require_finite(name, tensor, tensor.to(dtype))
    merged.to(dtype)
    merged.config.use_cache = True
    with quiet():
        merged.save_pretrained(str(out))


def _refuse_tied(adapted: torch.nn.Module, tied: dict[str, str]) -> None:
    """PEFT would add an update of one to the other too."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    ends = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
    for name, module in adapted.named_modules():
        plain = name.removeprefix("base_model.model.")
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) and plain in ends:
            raise InputError(
                f"{plain} is adapted, and shares its weights with {' and '.join(sorted(ends - {plain}))}: "
                "this model cannot be merged without making two of them, which its architecture does not allow here"
            )


def _round_trip(module: torch.nn.Module) -> torch.Tensor:
    """What NF4 keeps of a module's weight; GPT-2's Conv1D stands transposed when it is quantised."""
    from transformers.pytorch_utils import Conv1D

    weight: torch.Tensor = module.weight.data  # type: ignore[assignment]
    if isinstance(module, Conv1D):
        return round_trip_nf4(weight.T.contiguous()).T
    return round_trip_nf4(weight)
