"""The base: loaded once, quantised as the sweep file says, never changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import ROOT, flip_bit, make_spec
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GptOssConfig

from lora_search.errors import InputError
from lora_search.model import base_fingerprint, compute_dtype, load_base, load_tokenizer, round_trip_nf4
from lora_search.model.precision import quantised_linears
from lora_search.spec import Base

CPU = torch.device("cpu")


def test_base_is_nf4_with_double_quantisation(tiny: Path) -> None:
    base = load_base(make_spec(tiny).base, CPU)
    linears = [module for module in base.model.modules() if isinstance(module, Linear4bit)]
    assert len(linears) == 2 * 7
    for module in linears:
        assert module.weight.quant_state.quant_type == "nf4"
        assert module.weight.quant_state.nested
        assert module.compute_dtype == torch.float32
    assert "lm_head" not in quantised_linears(base.model)


def test_base_is_prepared_as_peft_would(tiny: Path) -> None:
    """Every parameter frozen, what is not in 4 bits in float32."""
    base = load_base(Base(model=str(tiny / "model"), compute_dtype="bfloat16"), CPU)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    others = [p for p in base.model.parameters() if type(p).__name__ != "Params4bit"]
    assert others
    assert {parameter.dtype for parameter in others} == {torch.float32}


def test_unquantised_base_is_in_the_compute_dtype(tiny: Path) -> None:
    base = load_base(Base(model=str(tiny / "model"), quantization="none", compute_dtype="bfloat16"), CPU)
    assert not quantised_linears(base.model)
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True}, torch.float32),
        ({"avx2": True, "avx512_f": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_takes_bfloat16_where_the_cpu_computes_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert compute_dtype("auto", CPU) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_takes_bfloat16_where_the_gpu_computes_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compute_dtype("auto", torch.device("cuda")) == expected


def test_named_dtype_is_taken_as_it_is() -> None:
    assert compute_dtype("float16", CPU) == torch.float16


def test_evaluation_does_not_repack_the_weights(tiny: Path) -> None:
    """bitsandbytes repacks them on a CPU with AVX512-BF16, for good, and training then reads nonsense."""
    base = load_base(make_spec(tiny).base, CPU)
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        trained = base.model.train()(input_ids=ids).logits
        evaluated = base.model.eval()(input_ids=ids).logits
        again = base.model.train()(input_ids=ids).logits
    assert torch.equal(trained, evaluated)
    assert torch.equal(trained, again)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_changes_memory_not_results(tiny: Path, dtype: str) -> None:
    from lora_search.data import tokenize_data
    from lora_search.engine import Engine, StepMetrics
    from lora_search.space import trial_config

    losses: list[list[float]] = []
    for checkpointing in (False, True):
        spec = make_spec(tiny, base={"gradient_checkpointing": checkpointing, "compute_dtype": dtype})
        base = load_base(spec.base, CPU)
        assert base.model.is_gradient_checkpointing == checkpointing
        engine = Engine(base, tokenize_data(spec.data, load_tokenizer(spec.base)))
        engine.admit("a", trial_config(spec, {"rank": 4, "dropout": 0.1, "learning_rate": 1e-2}))
        steps = [engine.step(["a"])["a"] for _ in range(4)]
        assert all(isinstance(step, StepMetrics) for step in steps)
        losses.append([step.loss for step in steps])  # type: ignore[union-attr]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_tokenizer_without_a_pad_token_is_given_one(tiny: Path) -> None:
    tokenizer = load_tokenizer(make_spec(tiny).base)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_pickled_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny / "model"))
    model.config.save_pretrained(str(tmp_path))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"base\.model: cannot load the model"):
        load_base(Base(model=str(tmp_path)), CPU)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_base_that_is_published_in_8_bits_is_refused_and_in_4_taken(
    tiny: Path, tmp_path: Path, quantization: str
) -> None:
    """Its products would be with codes: a base with no error, and of no sense."""
    for bits in (8, 4):
        config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
        published = AutoModelForCausalLM.from_pretrained(
            tiny / "model", quantization_config=config, device_map={"": "cpu"}
        )
        published.save_pretrained(tmp_path / str(bits))
    with pytest.raises(InputError, match=r"8 is published quantised, .*_proj in int8; allowed: full-precision"):
        load_base(Base(model=str(tmp_path / "8"), quantization=quantization), "cpu")
    load_base(Base(model=str(tmp_path / "4"), quantization=quantization), "cpu")


def test_experts_that_are_published_in_mxfp4_are_made_plain_numbers(tmp_path: Path) -> None:
    """As GPT-OSS's are; and what 4 bits would be made of is said to be none."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(GptOssConfig(**shape, **heads, vocab_size=2000)).to(torch.bfloat16)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, features, out_features = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out_features, features // 32, 16), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": torch.full(blocks.shape[:3], 120, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    published = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | published))
    with pytest.raises(InputError, match=r"base\.quantization: found nf4; .* in MXFP4, .* allowed: none"):
        load_base(Base(model=str(tmp_path)), CPU)
    base = load_base(Base(model=str(tmp_path), quantization="none"), CPU)
    assert {parameter.dtype for parameter in base.model.parameters()} <= {torch.bfloat16, torch.float32}
    assert base.model.model.layers[0].mlp.experts.down_proj.abs().max() > 0


def test_code_of_a_model_is_not_run_unasked(tiny: Path, tmp_path: Path) -> None:
    config = (tiny / "model" / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"model_type": "llama"', '"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}')
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    with pytest.raises(InputError, match=r"runs code of its own; base\.trust_remote_code"):
        load_base(Base(model=str(tmp_path)), CPU)
    assert not (tmp_path / "was_run").exists()


def test_model_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        load_base(Base(model=str(tmp_path)), CPU)
    assert len(str(caught.value).splitlines()) == 1


def test_fingerprint_follows_the_weights_and_nothing_else(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny / "model", tmp_path / "models--a--b" / "snapshots" / "1234")
    found = base_fingerprint(str(folder), None)
    assert found == base_fingerprint(str(tiny / "model"), None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # where a hub's models lie
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("1234")
    assert base_fingerprint("a/b", None) == base_fingerprint("a/b", "1234") == found
    assert base_fingerprint("a/other", None) is None
    (folder / "README.md").write_text("new words")
    (folder / "consolidated.safetensors").write_bytes(b"the same in another layout, which nobody loads")
    assert base_fingerprint(str(folder), None) == found
    base = Base(model=str(folder), quantization="none", compute_dtype="float32")
    model = load_base(base, "cpu").model
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 1e-3)
    model.save_pretrained(str(folder))
    changed = base_fingerprint(str(folder), None)
    assert changed != found
    (folder / "model.safetensors").unlink()
    model.save_pretrained(str(folder), max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    in_shards = base_fingerprint(str(folder), None)
    assert in_shards not in (found, changed)
    flip_bit(min(folder.glob("model-*.safetensors")), 100)
    assert base_fingerprint(str(folder), None) != in_shards
    named = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "consolidated.safetensors"}
    (folder / "config.json").write_text(json.dumps(named))
    by_name = base_fingerprint(str(folder), None)
    flip_bit(folder / "consolidated.safetensors")
    assert base_fingerprint(str(folder), None) != by_name


def test_fingerprint_notices_any_tensor_that_is_another(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between the samples of a file that is larger than this one."""
    monkeypatch.setattr("lora_search.model.identity.SAMPLES", 2)
    monkeypatch.setattr("lora_search.model.identity.SAMPLE_BYTES", 16)
    folder = shutil.copytree(tiny / "model", tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, metadata={"format": "pt"})
    found = {base_fingerprint(str(folder), None)}
    for name, tensor in tensors.items():
        save_file(tensors | {name: tensor + 0.25}, file, metadata={"format": "pt"})
        found.add(base_fingerprint(str(folder), None))
    assert len(found) == 1 + len(tensors)


def test_nf4_round_trip_is_what_the_quantised_base_computes_with(tiny: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(str(tiny / "model"), dtype=torch.float32)
    base = load_base(make_spec(tiny).base, CPU)
    for name in quantised_linears(base.model):
        module = plain.get_submodule(name)
        module.weight.data = round_trip_nf4(module.weight.data)
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, base.model(input_ids=ids).logits, atol=1e-6)


def test_builtin_demo_is_small_and_pretrained() -> None:
    from lora_search.builtin import data_file, model_folder

    folder = model_folder("demo").parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 6_000_000
    assert (model_folder("demo") / "model.safetensors").is_file()
    assert len(data_file("demo").read_text().splitlines()) > 1500
    tokenizer = load_tokenizer(Base())
    model = AutoModelForCausalLM.from_pretrained(str(model_folder("demo")), dtype=torch.float32)
    text = (ROOT / "lora_search" / "rundir.py").read_text().splitlines()[0].strip(
        '"'
    ) + "\nReturn the name of the file."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < 5.5  # ln(2048) = 7.6 before it has read anything
