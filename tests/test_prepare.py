"""What is checked once, before any trial."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import make_spec
from transformers import MixtralConfig

from lora_search.errors import InputError
from lora_search.placement import HostPlace
from lora_search.sweep.prepare import DataSummary
from lora_search.sweep.prepare import prepare as prepare_at

if TYPE_CHECKING:
    from lora_search.data import TokenizedData
    from lora_search.spec import SweepSpec


def prepare(spec: SweepSpec) -> tuple[DataSummary, TokenizedData]:
    return prepare_at(spec, HostPlace("host-0", "node", cpus=1, gpus=0))


def test_trial_that_can_never_fit_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_search.sweep.capacity.usable_bytes", lambda device, hosts: 640 << 20)
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


def test_every_target_of_the_space_is_held_against_the_model(tiny: Path) -> None:
    space = {"target_modules": {"choice": ["all-linear", ["q_proj", "w_proj"]]}}
    with pytest.raises(InputError, match="'w_proj'"):
        prepare(make_spec(tiny, search={"space": space}))
