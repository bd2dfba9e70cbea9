"""Floating-point operations of a token, two for each multiplication and addition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_search.targets import ModuleTree, experts_per_token

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class BaseWork:
    """What decides the operations of a token that passes through a base."""

    numbers: int
    """Of all linear weights that a token meets."""
    head: int
    layers: int
    hidden: int

    @property
    def attention(self) -> int:
        return self.layers * self.hidden

    def forward(self, length: float, targets: float) -> float:
        """Operations of a token.

        Args:
            length: tokens of its row; causal attention sees half of it.
            targets: share of the tokens that go through the output head.
        """
        return 2 * self.numbers + 2 * self.head * targets + 2 * self.attention * length

    def training(self, length: float, targets: float, trainable: int, *, checkpointing: bool) -> float:
        """Forward and backward: the frozen weights cost twice their forward (they have no gradient), the adapter's
        three times, and attention, whose scores are computed again, three and a half times."""
        recomputed = 2 * self.numbers + 2 * self.attention * length if checkpointing else 0
        frozen = 4 * self.numbers + 4 * self.head * targets
        return frozen + 7 * self.attention * length + 6 * trainable + recomputed


def base_work(config: PreTrainedConfig, tree: ModuleTree, vocabulary: int) -> BaseWork:
    """Read a base's work off its modules; of a layer's experts, those that a token is sent to."""
    picked = experts_per_token(config)
    numbers = sum(
        module.in_features * module.out_features * (min(picked, module.experts) if module.kind == "experts" else 1)
        for module in (*tree.modules, *tree.refused)
        if module.role != "tower"
    )
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    return BaseWork(numbers, vocabulary * hidden, int(text.num_hidden_layers), hidden)
