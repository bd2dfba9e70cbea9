"""Bases and rows for the benchmarks: the demo's and real ones, and random ones in the shape of well-known models."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lora_search.data import TokenizedData
from lora_search.data.tokens import TokenSplit, tokenize_data
from lora_search.model import FrozenBase, load_base, load_tokenizer
from lora_search.model.precision import compute_dtype
from lora_search.space import TrialConfig
from lora_search.spec import Base, Data
from lora_search.spec.schema import Lora, Training

SHAPES = {
    # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny-shape": (128, 256, 2, 4, 2, 512),
    "0.5b-shape": (896, 4864, 24, 14, 2, 151_936),  # Qwen2.5-0.5B
    "1b-shape": (2048, 8192, 16, 32, 8, 128_256),  # Llama-3.2-1B
    "8b-shape": (4096, 14_336, 32, 32, 8, 128_256),  # Llama-3-8B
}


def make_base(name: str, device: str, dtype: str, checkpointing: bool = False) -> FrozenBase:
    """`builtin:demo`, a folder, or one of SHAPES with random weights, in NF4."""
    if name not in SHAPES:
        base = Base(model=name, compute_dtype=dtype, gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
        return load_base(base, device)
    base = random_base(name, torch.device(device), compute_dtype(dtype, torch.device(device)))
    if checkpointing:
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.model.enable_input_require_grads()
    return base


def random_base(name: str, device: torch.device, dtype: torch.dtype) -> FrozenBase:
    """A Llama of a shape, its linear layers quantised one at a time so that it need never fit unquantised."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.manual_seed(0)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            shape = (module.out_features, module.in_features)
            linear = Linear4bit(*shape[::-1], bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            weight = torch.randn(shape, dtype=dtype, device=device) * 0.02
            linear.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(
                device
            )
            linear.quant_state = linear.weight.quant_state
            linear.support_avx512bf16_for_cpu = False
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, linear)
    rotary = model.model.rotary_emb
    with device:  # its frequencies are no weights
        model.model.rotary_emb = type(rotary)(config)
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, last = path.rpartition(".")
            value = torch.ones(parameter.shape) if parameter.ndim == 1 else torch.randn(parameter.shape) * 0.02
            setattr(model.get_submodule(parent), last, nn.Parameter(value.to(device), requires_grad=False))
    model.tie_weights()
    model.requires_grad_(False)
    model.config.use_cache = False
    return FrozenBase(model=model, device=device, compute_dtype=dtype, quantized=True)


def make_data(name: str, base: str, sequence: int) -> TokenizedData:
    """`builtin:demo`, a JSONL of prompts and completions, or random tokens for a base that is only a shape."""
    if base in SHAPES:
        return random_rows(SHAPES[base][-1], sequence)
    e2e = {"columns": {"prompt": "meaning_representation", "completion": "human_reference"}} if "e2e" in name else {}
    data = Data.model_validate({"path": name, "limit": 1100 if "e2e" in name else None, **e2e})
    return tokenize_data(data, load_tokenizer(Base(model=base)))


def random_rows(vocabulary: int, length: int, rows: int = 256) -> TokenizedData:
    """Rows of one length, every token a target."""
    draw = np.random.default_rng(0)
    split = TokenSplit(
        draw.integers(0, vocabulary, rows * length).astype(np.int32),
        np.ones(rows * length, np.bool_),
        np.arange(rows + 1) * length,
    )
    return TokenizedData(split, split, split, 0, "random", 0, 0)


def trial(index: int, rank: int, dropout: float, batch_size: int) -> TrialConfig:
    """The benchmarks' trial: all linear layers, alpha twice the rank."""
    return TrialConfig(
        Lora(rank=rank, dropout=dropout, target_modules="all-linear"),
        Training(learning_rate=1e-3, steps=100_000, batch_size=batch_size, seed=index, lr_schedule="constant"),
    )
