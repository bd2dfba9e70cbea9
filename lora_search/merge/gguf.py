"""Write a merged model as one GGUF file, for llama.cpp and what is built on it: Ollama, LM Studio.

The `gguf` package writes the file, and knows each architecture's names of the tensors. It is not needed for anything
else, and imported where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_search.errors import InputError, SweepError
from lora_search.merge.gguf_families import (
    Family,
    context_length,
    describe,
    family_of,
    interleave,
    rotary_factors,
)
from lora_search.merge.gguf_vocabulary import Vocabulary, gguf_vocabulary
from lora_search.merge.names import parameter_names
from lora_search.merge.published import DTYPES, Published, published_weights
from lora_search.model import load_tokenizer
from lora_search.spec import Base
from lora_search.targets.skeleton import skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = "pip install 'lora-search[gguf]'"
WIDENED = {"F64": "F32"}
"""What GGUF has no number of, and what is written instead."""


@dataclass(frozen=True)
class GgufForm:
    """What is known of a model's GGUF file before there is any of it."""

    vocabulary: Vocabulary
    name: str
    notes: Sequence[str]
    """What a user should know of how the file differs from the folder."""


def gguf_form(base: Base, tokenizer: PreTrainedTokenizerBase | None = None) -> GgufForm:
    """How a base, merged with whatever adapter, is written as GGUF.

    Raises:
        InputError: the `gguf` package is not installed, or this model or its tokenizer cannot be expressed.
    """
    try:
        import gguf  # noqa: F401 - whether it is there
    except ImportError:
        raise InputError(f"--gguf: needs the package gguf, which is not installed: {INSTALL}") from None
    model = skeleton(base.model, trust_remote_code=base.trust_remote_code, revision=base.revision)
    if base.trust_remote_code and getattr(model.config, "auto_map", None):
        raise InputError("--gguf: the base runs code of its own, which llama.cpp does not")
    family_of(model.config)
    vocabulary = gguf_vocabulary(tokenizer or load_tokenizer(base), model.config.vocab_size)
    longest, context = model.config.max_position_embeddings, context_length(model.config)
    notes = [*vocabulary.notes]
    if context < longest:
        notes.append(
            f"the GGUF file says a context of {context:,} tokens, not {longest:,}: that is the model's sliding window, "
            "and llama.cpp has none for it"
        )
    return GgufForm(vocabulary, f"{Path(base.model).name} merged", notes)


def write_gguf(folder: Path, form: GgufForm, file: Path) -> str:
    """Write the model of a folder, in safetensors, a tensor at a time.

    Matrices keep the dtype that they have in the folder; vectors and position embeddings become float32, as llama.cpp
    wants them.

    Returns:
        GGUF's name of the architecture.

    Raises:
        InputError: the model cannot be expressed, though its base could.
        SweepError: what was written is not what was announced.
    """
    import gguf

    model = skeleton(str(folder))
    family = family_of(model.config)
    published = published_weights(folder)
    tensors = _tensors(published, model, family)
    factors = rotary_factors(model.config)
    codes = [tensor.code for tensor in tensors.values() if len(tensor.shape) > 1]
    writer = gguf.GGUFWriter(file, family.architecture)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(form.name)
        writer.add_file_type(_file_type(max(codes, key=codes.count)))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        describe(writer, model.config)
        form.vocabulary.add_to(writer)
        for name, tensor in tensors.items():
            _announce(writer, name, tensor.shape, tensor.code)
        if factors is not None:
            _announce(writer, f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight", tuple(factors.shape), "F32")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for content in _contents(published, tensors, model, family):
            writer.write_tensor_data(content.contiguous().reshape(-1).view(torch.uint8).numpy())
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        if any(writer.tensors):
            raise SweepError(f"{file}: does not hold all tensors that were announced")
    finally:
        writer.close()
    return family.architecture


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file."""

    key: str
    """Of the published tensor that it is made of."""
    parameter: str
    shape: tuple[int, ...]
    code: str


def _tensors(published: Published, model: PreTrainedModel, family: Family) -> dict[str, _Tensor]:
    """The file's tensors by their names in it, in the order of the folder's files.

    Raises:
        InputError: one has no name in GGUF, or is missing.
    """
    import gguf

    (architecture,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    named = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    transposed = _transposed(model)
    tensors: dict[str, _Tensor] = {}
    parameters = parameter_names(published.tensors, model).whole
    for key, parameter in parameters.items():
        if parameter in tied:
            continue
        name = named.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"--gguf: {parameter} has no name in GGUF's {family.architecture}")
        stored = published.tensors[key]
        narrow = len(stored.shape) > 1 and not name.startswith("position_embd")
        code = WIDENED.get(stored.code, stored.code) if narrow else "F32"
        shape = stored.shape[::-1] if parameter in transposed else stored.shape
        tensors[name] = _Tensor(key, parameter, shape, code)
    missing = set(model.state_dict()) - tied - set(parameters.values())
    if missing:
        raise InputError(f"--gguf: {', '.join(sorted(missing))} is not among the model's weights")
    return tensors


def _transposed(model: PreTrainedModel) -> set[str]:
    """Parameters that stand transposed, as in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


def _contents(
    published: Published, tensors: Mapping[str, _Tensor], model: PreTrainedModel, family: Family
) -> Iterator[torch.Tensor]:
    """What is written, in the order of `tensors`."""
    transposed = _transposed(model)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": getattr(model.config, "num_key_value_heads", 0)}
    for tensor in tensors.values():
        content = published.read(tensor.key)
        module, _, kind = tensor.parameter.rpartition(".")
        last = module.rpartition(".")[2]
        if family.interleaved and last in heads:
            content = interleave(content, heads[last])
        if tensor.parameter in transposed:
            content = content.T
        if family.norms_from_one and last.endswith("norm") and kind == "weight":
            content = content.float() + 1
        yield content.to(DTYPES[tensor.code])


def _announce(writer: Any, name: str, shape: tuple[int, ...], code: str) -> None:
    import gguf

    count = int(np.prod(shape))
    kind = gguf.GGMLQuantizationType[code]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), count * DTYPES[code].itemsize, raw_dtype=kind)


def _file_type(code: str) -> int:
    import gguf

    kinds = {
        "F32": gguf.LlamaFileType.ALL_F32,
        "F16": gguf.LlamaFileType.MOSTLY_F16,
        "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    }
    return int(kinds[code])
