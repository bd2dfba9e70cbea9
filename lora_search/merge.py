"""Merge an adapter into a standard model, measure what the merge costs, and keep the better of the two ways.

PEFT's `merge_and_unload` on a 4-bit model leaves it 4-bit, and re-quantising loses accuracy. So the adapter is merged
into full-precision weights: the original ones, or those that NF4 made of them, which the adapter was trained on. The
two differ in loss, and which is better is measured (huggingface/transformers#31293, huggingface/peft#2321).
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from lora_search.checkpoint import require_lora
from lora_search.data import TokenizedData
from lora_search.engine import evaluate
from lora_search.errors import SweepError
from lora_search.model import FrozenBase, load_tokenizer
from lora_search.model.load import load_weights, model_path, quiet
from lora_search.model.precision import quantised_linears, round_trip_nf4
from lora_search.spec import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Onto = Literal["original", "dequantized"]

TOLERANCE = 0.01
"""Relative difference between the merged model's and the adapter's validation loss that passes without a warning."""


@dataclass(frozen=True)
class Merged:
    """What a merge came to."""

    onto: Onto
    """The weights that the adapter was added to."""
    losses: dict[str, float]
    """Validation loss of the saved model by the weights merged onto, each reloaded from disk."""
    adapter_loss: float
    """Validation loss of the adapter on its own base."""

    @property
    def loss(self) -> float:
        return self.losses[self.onto]

    @property
    def drift(self) -> float:
        """Relative difference of the kept merge's loss from the adapter's; negative where the merge is better."""
        return self.loss / self.adapter_loss - 1

    @property
    def within_tolerance(self) -> bool:
        return abs(self.drift) <= TOLERANCE


def merge_adapter(
    base: Base, adapter: Path, data: TokenizedData, adapter_loss: float, out: Path, device: torch.device
) -> Merged:
    """Merge an adapter into its base and save it at `out`, a folder that transformers alone loads.

    Each way is saved, loaded again as anybody would, and measured on the validation split; the better one stays.

    Args:
        base: as in the sweep file.
        adapter: a folder in PEFT's format.
        adapter_loss: nats a token of the adapter on its own base, over the same split.
        out: must not exist; appears only when the merge is complete.

    Raises:
        SweepError: `out` exists.
    """
    if out.exists():
        raise SweepError(f"{out} exists already")
    require_lora(adapter)
    ways: Sequence[Onto] = ("original", "dequantized") if base.quantization == "nf4" else ("original",)
    quantised = _quantised_names(base, device) if base.quantization == "nf4" else []
    parts = {way: out.with_name(f".{out.name}.{way}") for way in ways}
    losses: dict[str, float] = {}
    try:
        for way, part in parts.items():
            _save_merged(base, adapter, quantised if way == "dequantized" else [], part, device)
            losses[way] = _loss_from_disk(part, data, device)
        onto = min(ways, key=lambda way: losses[way])
        parts[onto].replace(out)
    finally:
        for part in parts.values():
            shutil.rmtree(part, ignore_errors=True)
    return Merged(onto, losses, adapter_loss)


def _quantised_names(base: Base, device: torch.device) -> list[str]:
    """The modules that hold 4-bit weights in the quantised base, by transformers' own choice."""
    model = load_weights(base, dtype="auto", device=device)
    names = quantised_linears(model)
    del model
    gc.collect()
    return names


def _save_merged(base: Base, adapter: Path, quantised: Sequence[str], out: Path, device: torch.device) -> None:
    """Merge into full-precision weights, those of `quantised` modules replaced by what NF4 makes of them."""
    from peft import PeftModel

    # Summed in float32: in bfloat16 a small update is lost in the rounding of the weight that it is added to.
    model = load_weights(base, dtype=torch.float32, device=device, quantize=False)
    with torch.no_grad():
        for name in quantised:
            module = model.get_submodule(name)
            module.weight.copy_(_round_trip(module))
    merged: PreTrainedModel = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    shutil.rmtree(out, ignore_errors=True)
    merged.to(_dtype_on_disk(base))
    merged.config.use_cache = True
    with quiet():
        merged.save_pretrained(str(out))
    load_tokenizer(base).save_pretrained(str(out))


def _round_trip(module: torch.nn.Module) -> torch.Tensor:
    """What NF4 keeps of a module's weight; GPT-2's Conv1D stands transposed when it is quantised."""
    from transformers.pytorch_utils import Conv1D

    weight: torch.Tensor = module.weight.data  # type: ignore[assignment]
    if isinstance(module, Conv1D):
        return round_trip_nf4(weight.T.contiguous()).T
    return round_trip_nf4(weight)


def _dtype_on_disk(base: Base) -> torch.dtype:
    """The dtype that the base's own weights are published in."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        model_path(base.model), revision=base.revision, trust_remote_code=base.trust_remote_code
    )
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _loss_from_disk(folder: Path, data: TokenizedData, device: torch.device) -> float:
    """The validation loss of a saved model, in float32 arithmetic."""
    plain = Base(model=str(folder), quantization="none", compute_dtype="float32")
    model = load_weights(plain, dtype=torch.float32, device=device)
    loaded = FrozenBase(model, device, torch.float32, quantized=False)
    return evaluate(loaded, data.validation, data.pad_token_id).loss
