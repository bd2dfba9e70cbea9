"""`lora-search merge --gguf`: one file that is, number by number and token by token, the merged model."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_spec, shared

pytest.importorskip("gguf", reason="needs the package gguf")

from lora_search.builtin import model_folder
from lora_search.checkpoint import Shelf
from lora_search.cli import main
from lora_search.data import tokenize_data
from lora_search.engine import Engine
from lora_search.errors import InputError, SweepError
from lora_search.merge.gguf import gguf_form, write_gguf
from lora_search.merge.gguf_families import FAMILIES
from lora_search.merge.gguf_vocabulary import SPLITS
from lora_search.merge.values import GGUF_ROUNDING
from lora_search.merge.verify import FreshProcess, Probe, compare
from lora_search.model import load_base, load_tokenizer
from lora_search.rundir import RunDirectory, create_run
from lora_search.space import trial_config
from lora_search.spec import Base, dump_spec, load_spec
from lora_search.tracking.record import RunRecord

CPU = torch.device("cpu")

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


@pytest.fixture(scope="module")
def fresh() -> Iterator[FreshProcess]:
    """The process in which transformers reads what was written."""
    with FreshProcess(Base(model="builtin:demo"), CPU) as process:
        yield process


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_same_model_from_gguf(
    name: str, tmp_path: Path, fresh: FreshProcess, record_property: Any
) -> None:
    model = write_model(MODELS[name], tmp_path / "model")
    probe = probe_of(model)
    read = fresh.ask_gguf(to_gguf(model, tmp_path / "model.gguf"), model, probe)
    apart = compare(read, fresh.ask(model, probe))
    record_property("apart", apart.relative)
    assert apart.relative < GGUF_ROUNDING
    assert apart.largest < 20 * GGUF_ROUNDING * apart.spread
    assert read.same == read.rows == len(probe.validation)


@pytest.mark.parametrize(("dtype", "code"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_matrices_keep_their_dtype_and_vectors_are_float32(
    dtype: str, code: str, tmp_path: Path, fresh: FreshProcess
) -> None:
    import gguf

    model = write_model(MODELS["qwen2"], tmp_path / "model", getattr(torch, dtype))
    file = to_gguf(model, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(file)
    kinds = {(len(tensor.shape) > 1, tensor.tensor_type.name) for tensor in reader.tensors}
    assert kinds == {(True, code), (False, "F32")}
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{code}"]
    probe = probe_of(model)
    assert compare(fresh.ask_gguf(file, model, probe), fresh.ask(model, probe)).relative < GGUF_ROUNDING


def test_mistral_says_the_context_that_llama_cpp_can_attend_to(tmp_path: Path) -> None:
    import gguf

    model = write_model(MODELS["mistral window"], tmp_path / "model")
    form = gguf_form(Base(model=str(model)))
    assert "a context of 48 tokens, not 512" in form.notes[-1]
    file = to_gguf(model, tmp_path / "model.gguf")
    assert gguf.GGUFReader(file).fields["llama.context_length"].contents() == 48
    (about_accents,) = gguf_form(Base(model=str(write_model(MODELS["mistral"], tmp_path / "plain")))).notes
    assert "NFC" in about_accents


@pytest.mark.parametrize("split", [*(name for name, _ in SPLITS.values()), "SentencePiece"])
def test_tokenizer_is_the_same_read_back(split: str, tmp_path: Path, fresh: FreshProcess) -> None:
    model = write_model(MODELS["llama"], tmp_path / "model")
    write_tokenizer(split, model)
    form = gguf_form(Base(model=str(model)))
    assert form.vocabulary.name == split
    assert form.vocabulary.adds["bos"] == (split != "gpt-2")
    probe = probe_of(model, vocabulary=300)
    read = fresh.ask_gguf(to_gguf(model, tmp_path / "model.gguf"), model, probe)
    assert read.different is None
    assert read.same == read.rows == len(probe.validation)


def refuse(model: Path, *said: str) -> None:
    with pytest.raises(InputError) as refused:
        gguf_form(Base(model=str(model)))
    for part in said:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("model_type", "config", "said"),
    [
        ("phi3", {"pad_token_id": 0}, ["'phi3'", "llama, mistral, qwen2, qwen3, gemma2, gpt2"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act: 'gelu'", "'silu' alone"]),
        (
            "llama",
            rope("yarn", factor=4.0, original_max_position_embeddings=128),
            ["'yarn'", "default, llama3, linear"],
        ),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, ["use_sliding_window: True"]),
        ("gemma2", GEMMA2 | {"query_pre_attn_scalar": 64}, ["query_pre_attn_scalar: 64", "16 alone"]),
        ("gemma2", GEMMA2 | {"final_logit_softcapping": None}, ["soft cap"]),
        ("gpt2", GPT2 | {"activation_function": "relu"}, ["activation_function: 'relu'"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_llama_cpp_would_run_otherwise_is_refused(
    model_type: str, config: Mapping[str, Any], said: list[str], tmp_path: Path
) -> None:
    refuse(write_model(Small(model_type, config), tmp_path / "model"), *said)


def change_tokenizer(model: Path, change: Mapping[str, Any]) -> None:
    file = model / "tokenizer.json"
    described = json.loads(file.read_text())
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(described[key], dict):
            described[key].update(value)
        else:
            described[key] = value
    file.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("split", "change", "said"),
    [
        ("gpt-2", {"pre_tokenizer": None}, ["text is split by nothing", "gpt-2, smollm, llama-bpe, qwen2"]),
        ("gpt-2", {"pre_tokenizer": {"use_regex": False}}, ["text is split by byte level;"]),
        ("llama-bpe", {"model": {"ignore_merges": False}}, ["\\p{N}{1,3}"]),
        ("qwen2", {"normalizer": {"type": "Lowercase"}}, ["the normalizer Lowercase"]),
        ("SentencePiece", {"normalizer": None}, ["not SentencePiece's"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tokenizer_that_llama_cpp_has_not_is_refused(
    split: str, change: Mapping[str, Any], said: list[str], tmp_path: Path
) -> None:
    model = write_model(MODELS["llama"], tmp_path / "model")
    write_tokenizer(split, model)
    change_tokenizer(model, change)
    refuse(model, "tokenizer cannot be expressed", *said)


def test_merges_that_no_scores_give_are_refused(tmp_path: Path) -> None:
    """SentencePiece's rule would merge what this list does not, or in another order."""
    model = write_model(MODELS["llama"], tmp_path / "model")
    write_sentencepiece(model)
    merges = json.loads((model / "tokenizer.json").read_text())["model"]["merges"]
    change_tokenizer(model, {"model": {"merges": merges[1:]}})
    refuse(model, "are not merged")
    twice = next(i for i, pair in enumerate(merges[:-1]) if "".join(pair) == "".join(merges[i + 1]))
    change_tokenizer(model, {"model": {"merges": [*merges[:twice], *merges[twice + 1 :], merges[twice]]}})
    refuse(model, "do not follow each other")


def test_missing_package_is_said_with_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refuse(model_folder("demo"), "needs the package gguf", "pip install 'lora-search[gguf]'")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run directory of two hardly trained trials on the demo model and some of its rows."""
    folder = tmp_path_factory.mktemp("demo")
    rows = (model_folder("demo").parent / "data.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    (folder / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    data = {"path": str(folder / "data.jsonl"), "max_length": 256, "template": "{prompt}\n"}
    spec = make_spec(folder, base={"model": "builtin:demo", "compute_dtype": "float32"}, data=data)
    run = create_run(folder, "demo", exact=True)
    run.spec.write_text(dump_spec(spec))
    engine = Engine(load_base(spec.base, CPU), tokenize_data(spec.data, load_tokenizer(spec.base)))
    record = RunRecord(run.trials, clock=lambda: 1000.0)
    for number in range(2):
        sampled = {"rank": 4, "learning_rate": 1e-2, "steps": 4, "dropout": 0.0, "target_modules": "all-linear"}
        engine.admit(str(number), trial_config(spec, sampled))
        for _ in range(4):
            engine.step([str(number)])
        loss = engine.evaluate([str(number)])[str(number)].loss
        Shelf(run.folder, number).put(engine.snapshot(str(number)))
        engine.release(str(number))
        record.trial_started(number, sampled)
        record.trial_reported(number, {"step": 4, "eval_loss": loss, "train_loss": loss, "host": "h"})
        record.trial_ended(number, "completed", None)
    record.close()
    return run


def merge(run: RunDirectory, out: Path, *arguments: str) -> int:
    return main(["merge", str(run.path), "--out", str(out), "--gguf", "--onto", "dequantized", *arguments])


def test_merge_writes_gguf_beside_the_folder_and_says_how_near_it_is(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(run, tmp_path / "seen", "--dtype", "float16") == 0
    assert "seen.gguf: architecture llama, tokenizer smollm; read back by transformers" in capsys.readouterr().out
    assert merge(run, tmp_path / "unseen", "--dtype", "float16", "--no-verify") == 0
    assert "unseen.gguf: architecture llama, tokenizer smollm; NOT verified" in capsys.readouterr().out
    assert (tmp_path / "seen.gguf").read_bytes() == (tmp_path / "unseen.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seen", "seen.gguf", "unseen", "unseen.gguf"]
    (tmp_path / "seen").rename(tmp_path / "other")
    assert merge(run, tmp_path / "seen") == 2
    assert "seen.gguf exists already" in capsys.readouterr().err


def test_gguf_of_several_trials_is_in_the_json_document(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(run, tmp_path / "merged", "--trials", "0,1", "--combine", "cat", "--json", "--tolerance", "1") == 0
    gguf = json.loads(capsys.readouterr().out)["gguf"]
    spec = load_spec(run.spec)
    assert gguf["file"] == "merged.gguf"
    assert gguf["rows"] == len(tokenize_data(spec.data, load_tokenizer(spec.base)).validation.offsets) - 1
    assert gguf["logits"]["mean"] < GGUF_ROUNDING * gguf["logits"]["spread"]
    assert gguf["logits"]["same_choice"] == 1.0


def test_model_that_cannot_be_expressed_is_refused_before_any_work(
    run: RunDirectory, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model's tokenizer knows whole words alone."""
    other = tmp_path / "runs" / "demo"
    shutil.copytree(str(run.path), other)
    (other / "sweep.yaml").write_text(run.spec.read_text().replace("builtin:demo", str(tiny / "model")))
    for arguments in (["--trial", "0"], ["--trials", "0,1"]):
        command = ["merge", str(other), "--out", str(tmp_path / "merged"), "--gguf", *arguments]
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "found a model of type WordLevel; allowed: BPE" in said
        assert "lowest validation loss" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


SLOW = """
import sys, time
import gguf
write = gguf.GGUFWriter.write_tensor_data
def slowly(self, tensor):
    write(self, tensor)
    self.flush()
    print("half", file=sys.__stdout__, flush=True)
    time.sleep(600)
gguf.GGUFWriter.write_tensor_data = slowly
from lora_search.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_killed_while_writing_gguf_leaves_no_half_file_and_the_next_one_succeeds(
    run: RunDirectory, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    arguments = ["merge", str(run.path), "--out", str(out), "--gguf", "--onto", "original", "--no-verify"]
    killed = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert killed.stdout is not None
    assert killed.stdout.readline() == "half\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (tmp_path / ".merged.merging" / "gguf" / "merged.gguf").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [".merged.merging"]
    assert main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "merged.gguf"]


def test_gguf_that_cannot_be_written_leaves_nothing(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gguf

    def full(self: Any, tensor: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    assert merge(run, tmp_path / "merged", "--no-verify") == 1
    assert "merged.gguf cannot be written: No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_gguf_of_other_numbers_is_not_kept(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if llama.cpp's order of a query's rows had been forgotten."""
    from lora_search.merge import gguf

    monkeypatch.setattr(gguf, "interleave", lambda weight, heads: weight)
    assert merge(run, tmp_path / "merged") == 1
    assert "the GGUF file is not the merged model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_gguf_that_tokenises_otherwise_is_refused(
    tmp_path: Path, fresh: FreshProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had been forgotten that the tokenizer begins each text with its bos token."""
    from lora_search.merge import gguf_vocabulary
    from lora_search.merge.merge import _to_gguf, _Verified

    model = write_model(MODELS["llama"], tmp_path / "model")
    probe = probe_of(model)
    monkeypatch.setattr(gguf_vocabulary, "_around", lambda tokenizer: {"bos": False, "eos": False})
    form = gguf_form(Base(model=str(model)))
    with pytest.raises(SweepError, match="the GGUF file's tokenizer is not the model's: 10 of 10 validation rows"):
        _to_gguf(form, model, tmp_path / "model.gguf", _Verified(fresh, probe, fresh.ask(model, probe)))


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
    """Loads a file, to run in float32; skips the test where llama.cpp is not installed."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
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
