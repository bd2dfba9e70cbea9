"""What is checked once, before any trial."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from conftest import make_spec
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, MixtralConfig, OPTConfig, PretrainedConfig

from lora_search.errors import InputError
from lora_search.placement import HostPlace
from lora_search.plan import plan_sweep
from lora_search.sweep.prepare import DataSummary
from lora_search.sweep.prepare import prepare as prepare_at

if TYPE_CHECKING:
    from lora_search.data import TokenizedData
    from lora_search.spec import SweepSpec


def prepare(spec: SweepSpec) -> tuple[DataSummary, TokenizedData]:
    return prepare_at(spec, HostPlace("host-0", "node", cpus=1, gpus=0))


def test_trial_that_can_never_fit_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_search.sweep.capacity.usable_bytes", lambda device, hosts, trials: 640 << 20)
    space = {"rank": {"choice": [4, 2048]}}
    with pytest.raises(InputError, match=r"search\.space\.rank: found 2048.*at most \d+ fits"):
        prepare(make_spec(tiny, search={"space": space}))


def test_data_is_tokenised_and_summed_up(tiny: Path) -> None:
    summary, data = prepare(make_spec(tiny))
    assert (summary.train_rows, summary.test_rows) == (len(data.train), len(data.test))
    assert summary.train_rows + summary.validation_rows + summary.test_rows == 200
    assert summary.fingerprint == data.fingerprint


def test_dropout_on_fused_experts_is_refused_before_any_trial(tiny: Path, tmp_path: Path) -> None:
    """PEFT raises for it, which would fail trial after trial."""
    shutil.copytree(tiny / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=24, num_local_experts=2, num_key_value_heads=2, **sizes)
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(str(tmp_path / "model"))
    base = {"model": str(tmp_path / "model")}
    with pytest.raises(InputError, match=r"search\.space\.dropout: .*experts of Mixtral.* set dropout: 0"):
        prepare(make_spec(tiny, base=base))
    space = {"rank": 4, "dropout": 0.0, "target_modules": "all-linear", "learning_rate": 1e-3}
    prepare(make_spec(tiny, base=base, search={"space": space}))
    attention = {"rank": 4, "dropout": 0.1, "target_modules": "attention"}
    prepare(make_spec(tiny, base=base, search={"space": attention}))
    several = space | {"target_modules": {"choice": ["attention", "all-linear", "re:.*experts.down_proj"]}}
    with pytest.raises(InputError, match=r"target_modules: .*'all-linear' and 're:.*experts.down_proj' hold other"):
        prepare(make_spec(tiny, base=base, search={"space": several}))


def test_every_target_of_the_space_is_held_against_the_model(tiny: Path) -> None:
    space = {"target_modules": {"choice": ["all-linear", ["q_proj", "w_proj"]]}}
    with pytest.raises(InputError, match="'w_proj'"):
        prepare(make_spec(tiny, search={"space": space}))


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "stated"),
    [
        (GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=2, n_positions=12), 12),
        (OPTConfig(vocab_size=24, ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=12, **SMALL), 12),
        (GPTJConfig(vocab_size=24, n_embd=32, n_layer=2, n_head=2, rotary_dim=4, n_positions=12), 12),
        (GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=2, n_positions=24), None),
    ],
    ids=["gpt2", "opt", "gptj", "room enough"],
)
def test_row_beyond_the_table_of_positions_is_refused(
    tiny: Path, tmp_path: Path, config: PretrainedConfig, stated: int | None
) -> None:
    """By plan as by run: each trial would fail by it, one after the other. What is refused would fail, and no other."""
    model = AutoModelForCausalLM.from_config(config)
    shutil.copytree(tiny / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config.architectures = [type(model).__name__]
    config.save_pretrained(str(tmp_path / "model"))
    space = {"rank": 4, "dropout": 0.0}
    spec = make_spec(tiny, base={"model": str(tmp_path / "model")}, search={"space": space})
    if stated is None:
        assert prepare(spec)[0].advice is None
        return
    model(torch.zeros(1, stated, dtype=torch.long))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.zeros(1, stated + 1, dtype=torch.long))
    said = rf"data\.max_length: the longest row has 20 tokens; allowed: at most {stated},"
    with pytest.raises(InputError, match=said):
        prepare(spec)
    with pytest.raises(InputError, match=said):
        plan_sweep(spec)
    cut = make_spec(tiny, base={"model": str(tmp_path / "model")}, search={"space": space}, data={"max_length": stated})
    prepare(cut)


def test_row_beyond_what_a_rotary_base_was_made_for_is_warned_of(tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 12}))
    spec = make_spec(tiny, base={"model": str(model)})
    for advice in (prepare(spec)[0].advice, plan_sweep(spec).advice):
        assert advice is not None
        assert "20 tokens" in advice
        assert "made for 12 (max_position_embeddings)" in advice
    assert prepare(make_spec(tiny))[0].advice is None
