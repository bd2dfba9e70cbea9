"""`lora-search merge --gguf`: one file that is, number by number and token by token, the merged model."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_spec
from gguf_models import (
    GEMMA2,
    GPT2,
    MODELS,
    Small,
    change_tokenizer,
    probe_of,
    rope,
    to_gguf,
    write_model,
    write_sentencepiece,
    write_tokenizer,
)
from trained_run import DEMO_DATA, train_run

from lora_search.builtin import model_folder
from lora_search.cli import main
from lora_search.data import tokenize_data
from lora_search.errors import InputError, SweepError
from lora_search.merge import gguf_vocabulary
from lora_search.merge.gguf import gguf_form
from lora_search.merge.gguf_vocabulary import SPLITS
from lora_search.merge.values import GGUF_ROUNDING
from lora_search.merge.verify import FreshProcess, compare
from lora_search.model import load_tokenizer
from lora_search.rundir import RunDirectory
from lora_search.spec import Base, load_spec

pytest.importorskip("gguf", reason="needs the package gguf")

pytestmark = pytest.mark.usefixtures("kept_verifier")

CPU = torch.device("cpu")


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


@pytest.mark.parametrize(
    ("kind", "expected"), [("Qwen2", "qwen2"), ("GPT2", "gpt-2"), ("Llama", True), ("Gemma", False)]
)
def test_tokenizers_of_transformers_own_making_are_known(kind: str, expected: str | bool) -> None:
    import transformers

    texts = ["<|endoftext|>", "<unk>", "<s>", "</s>", "<pad>", "<eos>", "<bos>", "<mask>", "a", "b", "ab"]
    made = getattr(transformers, f"{kind}Tokenizer")(vocab={t: n for n, t in enumerate(texts)}, merges=[("a", "b")])
    described = gguf_vocabulary._described(made)
    found = (gguf_vocabulary._split if isinstance(expected, str) else gguf_vocabulary._prefixes_space)(described)
    assert found == expected


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
    spec = make_spec(folder, name="demo", base={"model": "builtin:demo", "compute_dtype": "float32"}, data=DEMO_DATA)
    sampled = {"rank": 4, "learning_rate": 1e-2, "steps": 4, "dropout": 0.0, "target_modules": "all-linear"}
    return train_run(spec, folder, [(sampled, 4)] * 2, every=4, seconds=1000.0)


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
    (other / "sweep.yaml").write_text(run.spec.read_text().replace("model: builtin:demo", f"model: {tiny / 'model'}"))
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
    from lora_search.merge.merge import _to_gguf, _Verified

    model = write_model(MODELS["llama"], tmp_path / "model")
    probe = probe_of(model)
    monkeypatch.setattr(gguf_vocabulary, "_around", lambda tokenizer: {"bos": False, "eos": False})
    form = gguf_form(Base(model=str(model)))
    with pytest.raises(SweepError, match="the GGUF file's tokenizer is not the model's: 10 of 10 validation rows"):
        _to_gguf(form, model, tmp_path / "model.gguf", _Verified(fresh, probe, fresh.ask(model, probe)))
