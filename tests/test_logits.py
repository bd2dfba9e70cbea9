"""Logits that an architecture scales or caps: found out by looking, and trained on in turns with its own gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from lora_search.data import FlatRows
from lora_search.engine import forward
from lora_search.engine.forward import PackedBase
from lora_search.engine.pack import Share
from lora_search.logits import Bend, find_bend
from lora_search.model import FrozenBase

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 501,
}
GROUPED = SIZES | {"num_key_value_heads": 2}

FAMILIES: dict[str, tuple[transformers.PreTrainedConfig, Bend]] = {
    "llama": (transformers.LlamaConfig(**GROUPED), Bend()),
    "gemma2": (transformers.Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=5.0), Bend(1.0, 5.0)),
    "cohere": (transformers.CohereConfig(**GROUPED, logit_scale=0.25), Bend(0.25)),
    "granite": (transformers.GraniteConfig(**GROUPED, logits_scaling=4.0), Bend(0.25)),
}


def base_of(family: str) -> FrozenBase:
    """A base with logits of several times its cap, all frozen but the embeddings, which show the gradient."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family][0]).requires_grad_(False)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn_like(head.weight), requires_grad=False)
    model.get_input_embeddings().weight = nn.Parameter(torch.randn_like(head.weight))
    return FrozenBase(model, torch.device("cpu"), torch.float32, False)


def rows() -> FlatRows:
    lengths = (9, 14, 5)
    tokens = np.random.default_rng(1).integers(0, 501, sum(lengths))
    starts = np.cumsum(lengths) - lengths
    targets = np.setdiff1d(np.arange(sum(lengths)), starts)
    return FlatRows(tokens, np.arange(sum(lengths)) - np.repeat(starts, lengths), lengths, targets - 1, tokens[targets])


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_and_cap_are_found_by_looking(family: str) -> None:
    found, expected = PackedBase(base_of(family), pad_token_id=0).bend, FAMILIES[family][1]
    assert found is not None
    assert (found.scale, found.cap) == (pytest.approx(expected.scale, rel=1e-6), expected.cap)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_in_turns_are_those_of_the_models_own_code(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(forward.LOGIT_BYTES, "cpu", 7 * 501 * 4)  # four turns
    base = base_of(family)
    packed = PackedBase(base, pad_token_id=0)
    embeddings = base.model.get_input_embeddings().weight
    seen = []
    for bend in (packed.bend, None):
        packed.bend, embeddings.grad = bend, None
        (objective,) = packed.train(packed.pack([Share(rows(), None, weight=0.25)]))
        (standing,) = packed.measure(packed.pack([Share(rows(), None)]))
        seen.append((objective, standing, embeddings.grad))
    (loss, standing, grad), (own_loss, own_standing, own_grad) = seen
    assert loss == pytest.approx(own_loss, rel=1e-5)
    assert standing.hits == own_standing.hits
    torch.testing.assert_close(standing.losses_M, own_standing.losses_M, rtol=1e-5, atol=1e-5)
    assert (grad - own_grad).norm() < 1e-5 * own_grad.norm()


class Bent(nn.Module):
    """A model whose logits are some function of its head's."""

    def __init__(self, function: torch.nn.Module) -> None:
        super().__init__()
        self.head = nn.Linear(4, 9)
        self.function = function

    def forward(self) -> torch.Tensor:
        logits: torch.Tensor = self.function(self.head(torch.ones(1, 3, 4)))
        return logits


@pytest.mark.parametrize(
    "function",
    [nn.Softsign(), nn.ReLU(), nn.LeakyReLU(), nn.Softmax(-1), nn.LayerNorm(9), nn.ConstantPad1d((0, 1), 0.0)],
)
def test_what_is_neither_scale_nor_cap_is_left_to_the_models_code(function: nn.Module) -> None:
    model = Bent(function)
    assert find_bend(model.head, model) is None
    assert not model.head._forward_hooks


def test_model_that_goes_past_its_output_head_is_left_to_its_code() -> None:
    head = nn.Linear(4, 9)
    assert find_bend(head, lambda: torch.ones(3, 4) @ head.weight.T) is None
