"""A GGUF file run by llama.cpp itself: it gives the model's own tokens and probabilities."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shared
from gguf_models import MODELS, NASTY, change_tokenizer, probe_of, to_gguf, write_model, write_tokenizer

from lora_search.builtin import model_folder
from lora_search.merge.gguf_vocabulary import SPLITS
from lora_search.model import load_tokenizer
from lora_search.spec import Base

pytest.importorskip("gguf", reason="needs the package gguf")
xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")


@dataclass
class LlamaCpp:
    """llama.cpp itself, with a model loaded: its own server, in this process."""

    server: Any

    def tokens(self, text: str) -> list[int]:
        """As it tokenises a prompt."""
        asked = {"content": text, "add_special": True, "parse_special": True}
        return list(self._ask("/tokenize", asked)["tokens"])

    def log_probabilities(self, tokens: Sequence[int], vocabulary: int, forced: int) -> np.ndarray[Any, Any]:
        """Of what comes after some tokens, shape (vocabulary,).

        Args:
            forced: a token to go on with; it says nothing of one that it cannot show, as half a character.
        """
        asked = {"prompt": list(tokens), "n_predict": 1, "n_probs": vocabulary, "logit_bias": [[forced, 1000.0]]}
        (made,) = self._ask("/completion", asked)["completion_probabilities"]
        found = np.full(vocabulary, np.nan)
        for token in made["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found

    def greedy(self, tokens: Sequence[int], new: int) -> list[int]:
        asked = {"prompt": list(tokens), "n_predict": new, "temperature": 0.0, "return_tokens": True}
        return list(self._ask("/completion", asked)["tokens"])

    def _ask(self, path: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


def llama_cpp(file: Path) -> LlamaCpp:
    """Loads a file, to run in float32."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers, parameters.port = 512, 1, 0, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it halves keys
    parameters.warmup = False
    return LlamaCpp(xllamacpp.Server(parameters))


def run_apart(model: Path, file: Path, rows: Sequence[Sequence[int]]) -> float:
    """How far llama.cpp's log probabilities are from transformers', on average, in standard deviations."""
    from transformers import AutoModelForCausalLM

    runs = llama_cpp(file)
    kept = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
    forced = load_tokenizer(Base(model=str(model))).convert_tokens_to_ids("a")
    apart, spread = [], []
    for row in rows:
        with torch.no_grad():
            expected_TV = kept(torch.tensor([list(row)])).logits[0].float().log_softmax(-1).numpy()
        for length in {1, 2, len(row) // 3, len(row) // 2, len(row) - 1, len(row)}:
            found_V = runs.log_probabilities(row[:length], expected_TV.shape[1], forced)
            apart.append(np.abs(found_V - expected_TV[length - 1]).mean())
            spread.append(expected_TV[length - 1].std())
    return float(np.mean(apart) / np.mean(spread))


EXACT, TABLE = 1e-5, 2e-3
"""llama.cpp looks GELU up in a table of half precision; the rest is float32."""


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_runs_the_same_model(name: str, tmp_path: Path, record_property: Any) -> None:
    model = write_model(MODELS[name], tmp_path / "model")
    rows = [tokens for tokens, _ in probe_of(model).compared]
    apart = run_apart(model, to_gguf(model, tmp_path / "model.gguf"), rows)
    record_property("apart", apart)
    assert apart < (TABLE if MODELS[name].model_type in ("gemma2", "gpt2") else EXACT)


def without_prefix(model: Path) -> None:
    """As Gemma's tokenizer is."""
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    change_tokenizer(model, {"normalizer": normalizer, "pre_tokenizer": split})


@pytest.mark.parametrize("split", [*(name for name, _ in SPLITS.values()), "SentencePiece", "SentencePiece, no prefix"])
def test_llama_cpp_tokenises_as_the_model_does(split: str, tmp_path: Path) -> None:
    model = write_model(MODELS["llama"], tmp_path / "model")
    write_tokenizer(split.partition(",")[0], model)
    if "no prefix" in split:
        without_prefix(model)
    tokenizer = load_tokenizer(Base(model=str(model)))
    runs = llama_cpp(to_gguf(model, tmp_path / "model.gguf"))
    text = NASTY.replace("a\u0301", "") if split == "qwen2" else NASTY  # it composes accents, and that is noted
    for line in (text, *text.split("\n"), "  the tree", "<s>the</s> tree<|im_end|>and <think> in<think>"):
        if line:
            assert runs.tokens(line) == tokenizer(line)["input_ids"], line


@pytest.mark.parametrize("base", ["builtin:demo", "stories260k"])
def test_llama_cpp_goes_on_as_a_pretrained_model_does(base: str, tmp_path: Path, record_property: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    published = model_folder("demo") if base == "builtin:demo" else shared(base)
    kept = AutoModelForCausalLM.from_pretrained(str(published), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(published))
    model = tmp_path / "model"
    for part in (kept, tokenizer):
        part.save_pretrained(str(model))
    prompts = ["Once upon a time, there was a little", "name[The Eagle], food[English], area[riverside]\n"]
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    file = to_gguf(model, tmp_path / "model.gguf")
    runs = llama_cpp(file)
    assert [runs.tokens(prompt) for prompt in prompts] == rows
    for row in rows:
        ids = torch.tensor([row])
        made = kept.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        expected = made[0, len(row) :].tolist()
        found = runs.greedy(row, 40)
        record_property("text", tokenizer.decode(found))
        assert found == expected
    apart = run_apart(model, file, rows)
    record_property("apart", apart)
    assert apart < EXACT
