"""Small models of the architectures that are written as GGUF, tokenizers of each way that has a name there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_search.merge.gguf import gguf_form, write_gguf
from lora_search.merge.gguf_families import FAMILIES
from lora_search.merge.gguf_vocabulary import SPLITS
from lora_search.merge.verify import Probe
from lora_search.model import load_tokenizer
from lora_search.spec import Base

SAMPLE = """The cat sees 12 birds near the old tree; it's 3.14 o'clock, and they'll have gone by 10:30.
\tdef area(radius):\n\t\treturn 3.14159 * radius ** 2  # in square metres\n\n\nI'VE seen 1234567 stars!!! (or more...)
   Größe, naïve café, 東京は夜の七時, мир и труд, emoji 🚀 and 👩‍🚀, {"key": [1, 22, 333]} <html>&nbsp;</html>  end"""

NASTY = SAMPLE + "  \n \r\n  x  42  \n\n\t\t 007  'll 'LL don't 5000 0x1F  ½ ١٢٣ a\u0301 ﬁ …  "

SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def rope(kind: str, **values: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **values}}


@dataclass(frozen=True)
class Small:
    """An architecture made small."""

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
GEMMA2 = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
DEEPSEEK_V4 = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "sliding_window": 32,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}

MODELS = {
    "llama": Small("llama", {"num_key_value_heads": 4}),
    "llama tied": Small("llama", {"tie_word_embeddings": True}),
    "llama 3.1's frequencies": Small("llama", LLAMA3),
    "llama linear frequencies": Small("llama", rope("linear", factor=4.0)),
    "llama biases": Small("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": Small("llama", {"head_dim": 32}),
    "mistral": Small("mistral", {"sliding_window": None}),
    "mistral window": Small("mistral", {"sliding_window": 48}),
    "qwen2": Small("qwen2"),
    "qwen2 tied": Small("qwen2", {"tie_word_embeddings": True}),
    "qwen3": Small("qwen3", {"head_dim": 32, "rms_norm_eps": 1e-4}),
    "gemma2": Small("gemma2", GEMMA2),
    "gpt2": Small("gpt2", GPT2),
}


def write_model(small: Small, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of which every number matters, in several files, with a tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[small.model_type](**(SIZES | dict(small.config)))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
    model.to(dtype).save_pretrained(str(folder), max_shard_size="60KB")
    write_tokenizer("qwen2", folder)
    return folder


def write_tokenizer(split: str, folder: Path) -> None:
    """Byte-level BPE that splits text in one of the ways that llama.cpp has a name for, or SentencePiece's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>", "<|im_end|>"]
    if split == "SentencePiece":
        write_sentencepiece(folder)
        return
    tokenizer = Tokenizer(models.BPE())
    steps, looks_up = next((steps, looks_up) for steps, (name, looks_up) in SPLITS.items() if name == split)
    made = {
        "byte level, GPT-2's words": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "byte level": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "each digit": pre_tokenizers.Digits(individual_digits=True),
    }
    all_steps = [made.get(step) or pre_tokenizers.Split(Regex(str(step)), "isolated") for step in steps]
    tokenizer.pre_tokenizer = all_steps[0] if len(all_steps) == 1 else pre_tokenizers.Sequence(all_steps)
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=390, special_tokens=specials, initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator([SAMPLE] * 3, trainer)
    if looks_up:
        described = json.loads(tokenizer.to_str())
        described["model"]["ignore_merges"] = True
        tokenizer = Tokenizer.from_str(json.dumps(described))
    if split != "gpt-2":  # which puts nothing before a text
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_tokens(["<think>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    fast.chat_template = "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
    fast.save_pretrained(str(folder))


def write_sentencepiece(folder: Path) -> None:
    """What transformers makes of a SentencePiece model: bytes, and every pair that makes a token, by its score."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["the", "and", "in", "er", "th", "at", "tre", "tree", "bird", "ir", "bi", "rd", "an", "re", "es", "ee"]
    pieces = sorted({*"".join(words), *"aeiouylnmscdhr."}, key=ord)
    pieces += [piece for word in words for piece in (word, "\u2581" + word)] + ["\u2581", "\u2581t", "\u2581a"]
    pieces = list(dict.fromkeys(pieces))
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {text: number for number, text in enumerate(texts)}
    merges = [
        (piece[:middle], piece[middle:])
        for piece in sorted(pieces, key=len)
        for middle in range(1, len(piece))
        if piece[:middle] in vocabulary and piece[middle:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    fast.save_pretrained(str(folder))


def to_gguf(model: Path, file: Path) -> Path:
    assert write_gguf(model, gguf_form(Base(model=str(model))), file) in {f.architecture for f in FAMILIES.values()}
    return file


def probe_of(model: Path, *, vocabulary: int = 390) -> Probe:
    """Rows of many tokens, and some of the sample's text."""
    tokenizer = load_tokenizer(Base(model=str(model)))
    ids = torch.randint(3, vocabulary, (3, 40), generator=torch.Generator().manual_seed(1)).tolist()
    texts = [
        tokenizer(line)["input_ids"] for line in (NASTY, *NASTY.split("\n"), "<s>a<|im_end|></s> <think>b") if line
    ]
    compared = [(row, [False] + [True] * (len(row) - 1)) for row in ids]
    return Probe([(row, [True] * len(row)) for row in texts], compared, [], [], 0)


def change_tokenizer(model: Path, change: Mapping[str, Any]) -> None:
    file = model / "tokenizer.json"
    described = json.loads(file.read_text())
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(described[key], dict):
            described[key].update(value)
        else:
            described[key] = value
    file.write_text(json.dumps(described))
