"""The merged model: standard, and as good as the adapter that went into it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import adapter_losses, make_spec

from lora_search.checkpoint import write_checkpoint
from lora_search.data import tokenize_data
from lora_search.engine import Engine
from lora_search.errors import InputError, SweepError
from lora_search.merge import BESIDE, Merged, Options, lack_of_memory, merge_adapter
from lora_search.merge.memory import holds_two
from lora_search.merge.published import published_weights
from lora_search.merge.shards import ShardMerge
from lora_search.merge.staging import staging
from lora_search.merge.whole import merge_whole
from lora_search.model import load_base, load_tokenizer
from lora_search.space import trial_config
from lora_search.storage import Folder

if TYPE_CHECKING:
    from lora_search.data import TokenizedData
    from lora_search.spec import SweepSpec

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("kept_verifier")

LOADER = """
import sys
sys.modules["peft"] = sys.modules["bitsandbytes"] = None  # importing either raises ImportError
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert sys.modules["peft"] is sys.modules["bitsandbytes"] is None
print(type(model).__name__, getattr(model.config, "quantization_config", None), tokenizer.eos_token)
"""


def trained_adapter(spec: SweepSpec, folder: Path, **sampled: Any) -> tuple[TokenizedData, float]:
    """An adapter of some steps, saved in PEFT's format, with its validation loss."""
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    engine = Engine(load_base(spec.base, CPU), data)
    engine.admit("a", trial_config(spec, {"rank": 8, "learning_rate": 3e-2, "dropout": 0.0, "steps": 20, **sampled}))
    for _ in range(20):
        engine.step(["a"])
    loss = engine.evaluate(["a"])["a"].loss
    write_checkpoint(engine.snapshot("a"), Folder(folder))
    return data, loss


@pytest.fixture(scope="module")
def merged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepSpec, Path, Merged]:
    spec, folder = make_spec(tiny), tmp_path_factory.mktemp("merge")
    data, loss = trained_adapter(spec, folder / "adapter")
    return spec, folder, merge_adapter(spec.base, folder / "adapter", data, loss, folder / "merged", CPU)


def test_merged_model_is_as_good_as_its_adapter(merged: tuple[SweepSpec, Path, Merged]) -> None:
    _, _, result = merged
    assert set(result.losses) == {"original", "dequantized"}
    assert result.loss == min(result.losses.values())
    assert result.losses["dequantized"] == pytest.approx(result.adapter_loss, rel=1e-5)
    assert result.within_tolerance


def test_merged_model_loads_with_transformers_alone(merged: tuple[SweepSpec, Path, Merged]) -> None:
    _, folder, _ = merged
    answer = subprocess.run(
        [sys.executable, "-c", LOADER, str(folder / "merged")], capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == ["LlamaForCausalLM", "None", "</s>"]
    assert "quantization_config" not in json.loads((folder / "merged" / "config.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "merged"]  # nothing half done beside it


def test_model_that_fits_into_memory_once_but_not_twice_is_asked_in_turn(
    merged: tuple[SweepSpec, Path, Merged], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder, result = merged
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    assert holds_two(spec.base, CPU)
    monkeypatch.setattr("lora_search.merge.memory.free_memory_bytes", lambda: 3 * BESIDE // 2)
    assert lack_of_memory(spec.base, CPU) is None
    assert not holds_two(spec.base, CPU)
    again = merge_adapter(spec.base, folder / "adapter", data, result.adapter_loss, tmp_path / "merged", CPU)
    assert again == result


def test_saved_adapter_has_the_loss_that_was_reported(merged: tuple[SweepSpec, Path, Merged]) -> None:
    spec, folder, result = merged
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    losses = adapter_losses(load_base(spec.base, CPU), folder / "adapter", data)
    assert losses["validation"].loss == pytest.approx(result.adapter_loss, rel=1e-6)
    assert losses["validation"].loss < losses["untrained_validation"].loss
    assert losses["test"].loss < losses["untrained_test"].loss


def test_existing_folder_is_left_alone(merged: tuple[SweepSpec, Path, Merged], tmp_path: Path) -> None:
    spec, folder, result = merged
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    with pytest.raises(SweepError, match="exists already"):
        merge_adapter(spec.base, folder / "adapter", data, result.adapter_loss, tmp_path, CPU)
    assert not list(tmp_path.iterdir())


def test_failed_merge_leaves_nothing_half_done(merged: tuple[SweepSpec, Path, Merged], tmp_path: Path) -> None:
    spec, folder, _ = merged
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(
        (folder / "adapter" / "adapter_config.json").read_bytes()
    )
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"not an adapter")
    with pytest.raises(Exception, match=r"."):
        merge_adapter(spec.base, tmp_path / "adapter", data, 1.0, tmp_path / "merged", CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("by_shards", [True, False])
def test_number_that_the_dtype_cannot_hold_is_refused(
    merged: tuple[SweepSpec, Path, Merged], tiny: Path, tmp_path: Path, by_shards: bool
) -> None:
    """Though the adapter does not change it."""
    from safetensors.torch import load_file, save_file

    spec, folder, _ = merged
    model = Path(shutil.copytree(tiny / "model", tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = 1e5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    base = spec.base.model_copy(update={"model": str(model)})

    def merge() -> None:
        options = Options(onto="original", dtype="float16", verify=False)
        if by_shards:
            merge_adapter(base, folder / "adapter", None, None, tmp_path / "out", CPU, options)
        else:
            merge_whole(base, folder / "adapter", [], tmp_path / "out", torch.float16, CPU)

    with pytest.raises(SweepError, match=r"norm\.weight: is not finite after the merge in float16"):
        merge()
    assert not (tmp_path / "out").exists()


def test_merges_to_one_folder_never_meet(tmp_path: Path) -> None:
    """One is making it, and the others are told so, also in the moment in which one is done and the next begins."""
    inside, met, refused = threading.Lock(), [], []

    def merge(number: int) -> None:
        for _ in range(200):
            try:
                with staging(tmp_path / "out") as folder:
                    if not inside.acquire(blocking=False):
                        met.append(number)
                        continue
                    (folder / f"part-{number}").mkdir()
                    if [path.name for path in folder.iterdir() if path.name != ".lock"] != [f"part-{number}"]:
                        met.append(number)
                    inside.release()
            except SweepError:
                refused.append(number)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(merge, number) for number in range(4)]:
            done.result()
    assert not met
    assert len(refused) < 4 * 200
    assert list(tmp_path.iterdir()) == []


def test_unquantised_base_merges_one_way(tiny: Path, tmp_path: Path) -> None:
    spec = make_spec(tiny, base={"quantization": "none"})
    data, loss = trained_adapter(spec, tmp_path / "adapter", use_rslora=True, target_modules="mlp")
    result = merge_adapter(spec.base, tmp_path / "adapter", data, loss, tmp_path / "merged", CPU)
    assert result.losses.keys() == {"original"}
    assert result.loss == pytest.approx(loss, rel=1e-5)


def test_gpt2_with_its_transposed_weights_merges(tiny: Path, tmp_path: Path) -> None:
    """Conv1D stands transposed: quantised the other way round than it is merged."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(tiny / "model"))
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(str(tmp_path / "gpt2"))
    tokenizer.save_pretrained(str(tmp_path / "gpt2"))
    spec = make_spec(tiny, base={"model": str(tmp_path / "gpt2")})
    data, loss = trained_adapter(spec, tmp_path / "adapter", target_modules=["c_attn", "c_proj"])
    result = merge_adapter(spec.base, tmp_path / "adapter", data, loss, tmp_path / "merged", CPU)
    assert result.losses["dequantized"] == pytest.approx(loss, rel=1e-5)


def test_merge_that_forgets_the_adapter_is_found_out(
    merged: tuple[SweepSpec, Path, Merged], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder, _ = merged
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    monkeypatch.setattr(ShardMerge, "_changes", lambda self, dequantized: {})
    with pytest.raises(SweepError, match="is not what base and adapter are together"):
        merge_adapter(spec.base, folder / "adapter", data, None, tmp_path / "merged", CPU)
    assert not list(tmp_path.iterdir())


def test_base_published_quantised_or_pickled_is_refused(
    merged: tuple[SweepSpec, Path, Merged], tiny: Path, tmp_path: Path
) -> None:
    spec, folder, _ = merged
    for name in ("quantised", "pickled"):
        shutil.copytree(tiny / "model", tmp_path / name)
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    options = Options(onto="original", verify=False)
    for name, said in (("quantised", r"published quantised \(gptq\)"), ("pickled", "a pickle, which is never opened")):
        base = spec.base.model_copy(update={"model": str(tmp_path / name)})
        with pytest.raises(InputError, match=said):
            merge_adapter(base, folder / "adapter", None, None, tmp_path / "merged", CPU, options)


def test_index_may_not_lead_out_of_the_folder(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny / "model", folder)
    index = {"weight_map": {"lm_head.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="no name of a file beside it"):
        published_weights(folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "acts from certain tokens on"),
        ({"r": 3}, "does not fit its base"),
    ],
)
def test_adapter_that_cannot_be_merged_is_refused(
    merged: tuple[SweepSpec, Path, Merged], changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    spec, folder, _ = merged
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | changed
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    options = Options(onto="original", verify=False)
    with pytest.raises(InputError, match=said):
        merge_adapter(spec.base, tmp_path / "adapter", None, None, tmp_path / "merged", CPU, options)
    assert not (tmp_path / "merged").exists()


def test_adapter_with_biases_of_its_own_is_merged_in_memory(tiny: Path, tmp_path: Path) -> None:
    """PEFT adds them to the base's biases, which Qwen 2 has in its attention."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(tiny / "model"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=len(tokenizer) + 8, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(str(tmp_path / "base"))
    tokenizer.save_pretrained(str(tmp_path / "base"))
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_bias=True, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(str(tmp_path / "adapter"))
    spec = make_spec(tiny, base={"model": str(tmp_path / "base"), "quantization": "none"})
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    result = merge_adapter(spec.base, tmp_path / "adapter", data, None, tmp_path / "merged", CPU)
    assert result.in_memory == "the adapter trains biases of its own (lora_bias)"
    assert result.check is not None
    assert result.check.same_weights.largest < 1e-5


def test_in_memory_a_tied_head_is_refused(tiny: Path, tmp_path: Path) -> None:
    """PEFT would add the head's update to the embeddings too."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny / "model"))
    lora = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(str(tmp_path / "adapter"))
    base = make_spec(tiny, base={"quantization": "none"}).base
    with pytest.raises(InputError, match=r"lm_head is adapted, and shares its weights with model\.embed_tokens"):
        merge_whole(base, tmp_path / "adapter", [], tmp_path / "merged", torch.float32, CPU)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("merged_loss", "within"), [(1.0, True), (1.009, True), (1.02, False), (0.995, True), (0.97, False)]
)
def test_drift_beyond_one_percent_is_said(merged_loss: float, within: bool) -> None:
    assert Merged("original", {"original": merged_loss}, 1.0).within_tolerance == within
