"""The architectures that are written as GGUF: what llama.cpp is told of each, and what it takes for granted.

Each was run by llama.cpp itself and compared (tests/test_gguf_llama_cpp.py); every other one is refused. What is said
here is from llama.cpp's conversion/*.py and src/models/*.cpp (https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_search.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """How an architecture of transformers stands in a GGUF file."""

    architecture: str
    """By GGUF's name."""
    needs: Mapping[str, Sequence[object]]
    """Values of the configuration that llama.cpp takes for granted."""
    rotations: Sequence[str] = ("default",)
    """Kinds of rotary embedding that can be expressed."""
    interleaved: bool = False
    """llama.cpp rotates neighbours; transformers rotates a head's first half with its second."""
    norms_from_one: bool = False
    """transformers multiplies by 1 + weight, llama.cpp by the weight."""


_SILU: Mapping[str, Sequence[object]] = {"hidden_act": ("silu",)}
_QWEN = {**_SILU, "use_sliding_window": (False,)}
_LLAMA = Family("llama", _SILU, ("default", "llama3", "linear"), interleaved=True)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2", _QWEN),
    "qwen3": Family("qwen3", {**_QWEN, "attention_bias": (False,)}),
    "gemma2": Family(
        "gemma2",
        {"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,), "tie_word_embeddings": (True,)},
        norms_from_one=True,
    ),
    "gpt2": Family(
        "gpt2",
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "tie_word_embeddings": (True,),
        },
    ),
}
"""By transformers' `model_type`."""

GEMMA2_27B_LAYERS = 46
"""llama.cpp knows Gemma 2 of 27 billion by its layers, and scales its attention otherwise."""


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model.

    Raises:
        InputError: llama.cpp has none for it, or would run it otherwise than transformers does.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(f"--gguf: found a model of type {config.model_type!r}; allowed: {', '.join(FAMILIES)}")
    for key, allowed in family.needs.items():
        if (found := getattr(config, key, allowed[0])) not in allowed:
            values = " or ".join(map(repr, allowed))
            raise InputError(f"--gguf: {config.model_type}: found {key}: {found!r}; llama.cpp has {values} alone")
    kind = _rotation(config)
    if kind not in family.rotations:
        raise InputError(
            f"--gguf: {config.model_type}: found rotary embeddings of type {kind!r}; "
            f"allowed: {', '.join(family.rotations)}"
        )
    if config.model_type == "gemma2":
        _require_gemma2(config)
    return family


def context_length(config: PreTrainedConfig) -> int:
    """Tokens up to which llama.cpp's attention is the model's: it has no sliding window for Mistral."""
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return int(min(window or config.max_position_embeddings, config.max_position_embeddings))


def describe(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """Write the model's dimensions and constants, by GGUF's keys."""
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    size = _head_size(config)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)


def rotary_factors(config: PreTrainedConfig) -> torch.Tensor | None:
    """What llama.cpp divides each rotary frequency by, float32, half a head long; None where it is the usual ones.

    The frequencies are transformers' own.

    Raises:
        InputError: this kind of rotary embedding changes more than the frequencies.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = _rotation(config)
    if kind == "default":
        return None
    scaled, attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if attention != 1.0:
        raise InputError(f"--gguf: rotary embeddings of type {kind!r} scale the attention by {attention:g}")
    size = _head_size(config)
    usual = torch.pow(config.rope_parameters["rope_theta"], -torch.arange(0, size, 2, dtype=torch.float64) / size)
    factors: torch.Tensor = usual / scaled.double()
    return factors.float()


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection, or of its bias, as llama.cpp rotates them: shape as given."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _head_size(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotation(config: PreTrainedConfig) -> str:
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return "default"  # or none at all: GPT-2
    if "rope_theta" not in parameters:
        return "one for each kind of layer"
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "partial"
    return str(parameters.get("rope_type", "default"))


def _require_gemma2(config: PreTrainedConfig) -> None:
    large = config.num_hidden_layers == GEMMA2_27B_LAYERS
    scale = config.hidden_size // config.num_attention_heads if large else config.head_dim
    if config.query_pre_attn_scalar != scale:
        raise InputError(
            f"--gguf: gemma2: found query_pre_attn_scalar: {config.query_pre_attn_scalar}; llama.cpp has {scale} alone"
        )
    if not config.attn_logit_softcapping or not config.final_logit_softcapping:
        raise InputError("--gguf: gemma2: found no soft cap of the logits; llama.cpp has one in any case")
    turns = [("sliding_attention", "full_attention")[layer % 2] for layer in range(config.num_hidden_layers)]
    if list(config.layer_types) != turns:
        raise InputError("--gguf: gemma2: found layer_types that llama.cpp has not: it takes sliding and full in turns")
