"""The bytes of a base's weights, from its skeleton."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_search.memory.values import DTYPE_BYTES, Setup, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64
"""Numbers that share a scale in NF4."""

NESTED_BLOCK = 256
"""Scales, one byte each under double quantisation, that share a float32 scale of their own."""

TABLES = 4 * (16 + 256 + 1)
"""Each weight's float32 code tables, of its numbers and of its scales, and the scales' mean."""


def weigh(model: PreTrainedModel, setup: Setup) -> Weights:
    """Count a model's bytes as `lora_search.model.load_base` holds it."""
    linear = quantised_names(model) if setup.quantised else frozenset()
    width = _width(setup)
    quantised = packed = constants = rest = 0
    for name, parameter in model.named_parameters():  # each once, however many modules share it
        size = parameter.numel()
        if name.removesuffix(".weight") in linear:
            quantised += size
            packed += _packed(size)
            constants += nf4_constants(size)
        else:
            rest += width * size
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    head = model.get_output_embeddings()
    head_size = head.weight.numel() if head is not None else 0
    return Weights(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        quantised_parameters=quantised,
        packed=packed,
        constants=constants,
        unquantised=rest + buffers,
        head_copy=head_size * DTYPE_BYTES[setup.compute] if width != DTYPE_BYTES[setup.compute] else 0,
        vocabulary=head.weight.shape[0] if head is not None else 0,
    )


def parameter_bytes(model: PreTrainedModel, setup: Setup) -> dict[str, int]:
    """What each parameter takes as `load_base` holds it, by name; one that modules share stands there once."""
    linear = quantised_names(model) if setup.quantised else frozenset()
    return {
        name: _packed(parameter.numel()) + nf4_constants(parameter.numel())
        if name.removesuffix(".weight") in linear
        else _width(setup) * parameter.numel()
        for name, parameter in model.named_parameters()
    }


def _width(setup: Setup) -> int:
    """Bytes of a number that is not quantised: prepare_model_for_kbit_training leaves nothing in half precision."""
    return 4 if setup.quantised else DTYPE_BYTES[setup.compute]


def _packed(size: int) -> int:
    return (size + 1) // 2


def nf4_constants(size: int) -> int:
    """Bytes beside the 4-bit numbers of a weight of `size` numbers, with double quantisation."""
    scales = -(-size // BLOCK)
    return scales + 4 * -(-scales // NESTED_BLOCK) + TABLES


def quantised_names(model: PreTrainedModel) -> frozenset[str]:
    """The modules that transformers puts into 4 bits: linear layers but the output head and what it is tied to.

    Parameters that stand for themselves, as the fused experts of a mixture do, stay as they are.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return frozenset(
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    )
