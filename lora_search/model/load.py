"""Load the base and its tokenizer: a hub id, a local folder, or builtin:NAME."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Mxfp4Config
from transformers.utils import logging as transformers_logging

from lora_search.builtin import model_folder
from lora_search.errors import InputError, SweepError
from lora_search.memory.split import Split
from lora_search.model.borders import attach_borders
from lora_search.model.precision import compute_dtype
from lora_search.spec import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that are what they seem."""


@dataclass(frozen=True)
class FrozenBase:
    """A loaded base: no parameter of it is ever trained or changed."""

    model: PreTrainedModel
    device: torch.device
    """Where tokens come in and losses are taken; of several, the first."""
    compute_dtype: torch.dtype
    quantized: bool
    others: tuple[torch.device, ...] = ()
    """Where further decoder blocks are."""

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return (self.device, *self.others)

    @property
    def autocast(self) -> torch.autocast:
        """Products in the compute dtype, sums and norms in float32; does nothing where that is float32."""
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype if enabled else None, enabled=enabled)


def model_path(model: str) -> str:
    """What transformers loads for a sweep file's `base.model`: a folder or a hub id."""
    if model.startswith("builtin:"):
        return str(model_folder(model.removeprefix("builtin:")))
    return model


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a pad token in every case.

    Padding is masked out of attention and loss, so that any token will do; the end token stands in where there is
    no other.

    Raises:
        InputError: there is no tokenizer, or it has no vocabulary or no end token.
    """
    with _input_errors(base, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            model_path(base.model), revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes one of a config.json alone
        raise InputError(f"base.model: the tokenizer of {base.model} has no vocabulary: its files are missing")
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"base.model: the tokenizer of {base.model} has no end-of-sequence token, which training needs"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    base: Base, device: torch.device | str, others: Sequence[torch.device] = (), split: Split | None = None
) -> FrozenBase:
    """The base on one device, or its decoder blocks over several, quantised as the sweep file says, ready for adapters.

    What `peft.prepare_model_for_kbit_training` does holds here too: every parameter frozen, what is not quantised in
    float32. Where activations are recomputed, inputs ask for no gradient: only re-entrant checkpointing needs that, and
    it would send every gradient down to the embedding.

    Args:
        others: further devices.
        split: which blocks each device holds, where there are several (`BaseMemory.split`).

    Raises:
        InputError: there is no such model, it is no causal language model, has no safetensors weights, or was published
            quantised in another way than bitsandbytes' 4 bits.
    """
    if others and split is None:
        raise ValueError("a base over several devices needs a split")
    device = torch.device(device)
    devices = {"": device} if split is None else split.device_map((device, *others))
    dtype = compute_dtype(base.compute_dtype, device)
    model = load_weights(base, dtype="auto" if base.quantization == "nf4" else dtype, device=devices, nf4_compute=dtype)
    _require_plain_or_4bit(model, base.model)
    if base.quantization == "nf4":
        _prepare_for_kbit_training(model)
    else:
        model.requires_grad_(False)
    if base.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()
    model.config.use_cache = False
    if split is not None:
        _own_borders(model, devices)
    return FrozenBase(model, device, dtype, base.quantization == "nf4", tuple(others))


def _require_plain_or_4bit(model: PreTrainedModel, name: str) -> None:
    """Raise InputError where a linear layer's numbers are codes that our products would take for its weights."""
    for path, module in model.named_modules():
        weight = module.weight if isinstance(module, nn.Linear) else None
        if weight is not None and getattr(weight, "quant_state", None) is None and weight.dtype not in PLAIN:
            raise InputError(
                f"base.model: {name} is published quantised, {path} in {str(weight.dtype).removeprefix('torch.')}; "
                "allowed: full-precision weights, or bitsandbytes' 4 bits"
            )


def load_weights(
    base: Base,
    *,
    dtype: torch.dtype | str,
    device: torch.device | Mapping[str, torch.device],
    nf4_compute: torch.dtype = torch.float32,
    quantize: bool | None = None,
) -> PreTrainedModel:
    """The model as transformers loads it, in NF4 or in `dtype`; `quantize` overrules the sweep file.

    Args:
        device: one for all, or one for each part of the model, by name.
    """
    options: dict[str, Any] = {}
    quantizes = (base.quantization == "nf4") if quantize is None else quantize
    if _is_mxfp4(base):
        if quantizes:
            raise InputError(
                f"base.quantization: found nf4; {base.model} is published in MXFP4, which is made bfloat16 as it is "
                "loaded; allowed: none"
            )
        # Else, with the package kernels, its experts go through kernels that have no gradient.
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    elif quantizes:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=nf4_compute,
        )
    with _input_errors(base, "model"), quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model_path(base.model),
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            use_safetensors=True,
            dtype=dtype,
            device_map={"": device} if isinstance(device, torch.device) else dict(device),
            **options,
        )
    return model


def _is_mxfp4(base: Base) -> bool:
    """Whether its experts are published in MXFP4, as GPT-OSS's are."""
    with _input_errors(base, "model"), quiet():
        config = AutoConfig.from_pretrained(
            model_path(base.model), revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    published = getattr(config, "quantization_config", None)
    return isinstance(published, dict) and published.get("quant_method") == "mxfp4"


def _own_borders(model: PreTrainedModel, devices: Mapping[str, torch.device]) -> None:
    """Put our borders in the place of accelerate's hooks, once every weight is known to be where it should be."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    for name, parameter in model.named_parameters():
        wanted = next(device for part, device in devices.items() if name == part or name.startswith(f"{part}."))
        if parameter.device != wanted:
            raise SweepError(f"base.model: {name} is on {parameter.device} after loading, and should be on {wanted}")
    attach_borders(model, devices)


def _prepare_for_kbit_training(model: PreTrainedModel) -> None:
    from bitsandbytes.nn import Linear4bit
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with AVX512-BF16, bitsandbytes repacks the weights at the first evaluation, for good, into a
            # layout that only inference reads and whose products differ (bitsandbytes 0.50, nn/modules.py, forward).
            module.support_avx512bf16_for_cpu = False


@contextmanager
def _input_errors(base: Base, what: str) -> Iterator[None]:
    """Turn what transformers says of a wrong model id, folder or architecture into one message."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if not base.trust_remote_code and "custom code" in str(error):
            raise InputError(
                f"base.model: the {what} of {base.model!r} runs code of its own; base.trust_remote_code: true allows it"
            ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"base.model: cannot load the {what} of {base.model!r}: {first}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars from loading and saving: they belong to whoever called us, and hosts have no terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
