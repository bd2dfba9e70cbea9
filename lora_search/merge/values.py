"""What a merge is asked for, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lora_search.errors import SweepError

Onto = Literal["original", "dequantized"]

TOLERANCE = 0.01
"""Relative difference between the merged model's and the adapter's validation loss that passes without a warning."""

ROUNDING = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1}
"""Mean difference of logits, in their standard deviations, that the rounding of weights and products explains.

Measured: 5e-6 in float32 (random weights of 21 kinds), 1.3e-3 for the demo, whose weights are kept in 16 bits. The
limits leave room for deeper models; a merge that went wrong is far beyond.
"""


GGUF_ROUNDING = 1e-4
"""The same of a GGUF file and the folder that it was made of: the weights are the same numbers.

Measured on a CPU: 0, for small models of each kind and for the demo.
"""


class NotByShards(SweepError):
    """This merge needs the whole model in memory; the message says why."""


@dataclass(frozen=True)
class Options:
    """How to merge."""

    onto: Onto | Literal["auto"] = "auto"
    """`auto` measures both on the validation split and keeps the better."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Of the weights on disk; `auto` is what the base's own are published in."""
    verify: bool = True
    """Load what was written, measure and compare it. That needs memory for the whole model."""
    tolerance: float = TOLERANCE
    gguf: bool = False
    """Write the model as a GGUF file too."""


@dataclass(frozen=True)
class LogitsDifference:
    """How far the merged model's logits are from the adapter's, over held-out tokens."""

    targets: int
    largest: float
    mean: float
    spread: float
    """Standard deviation of the logits that they are compared with."""
    same_choice: float
    """Share of the tokens at which both would choose the same next token."""

    @property
    def relative(self) -> float:
        return self.mean / self.spread


@dataclass(frozen=True)
class Text:
    """A held-out prompt, and how each model goes on, greedily."""

    prompt: str
    adapter: str
    merged: str


@dataclass(frozen=True)
class Check:
    """The merged model, loaded in a process with transformers alone, beside the base with its adapter."""

    same_weights: LogitsDifference
    """From base and adapter, the base's weights those that were merged onto: the merge itself, and rounding."""
    as_trained: LogitsDifference
    """From base and adapter as they were trained: that, and what NF4 made of the base."""
    texts: Sequence[Text]


@dataclass(frozen=True)
class Gguf:
    """A merged model as a GGUF file."""

    file: str
    architecture: str
    """By GGUF's name."""
    tokenizer: str
    """SentencePiece, or llama.cpp's name of the way in which text is split."""
    logits: LogitsDifference | None
    """From the merged model's own folder, both read by transformers; None where it was not verified."""
    rows: int
    """Validation rows whose tokens are the same from both."""
    notes: Sequence[str]


@dataclass(frozen=True)
class Merged:
    """What a merge came to."""

    onto: Onto
    """The weights that the adapter was added to."""
    losses: Mapping[str, float]
    """Validation loss of the saved model by the weights merged onto, each loaded from disk; empty if not verified."""
    adapter_loss: float | None
    """Validation loss of the adapter on its own base."""
    check: Check | None = None
    """None where it was not verified."""
    tolerance: float = TOLERANCE
    in_memory: str | None = None
    """Why the model was merged in memory and not shard by shard; None where it was not."""
    notes: Sequence[str] = field(default_factory=tuple)
    """What else the user should know of the model."""
    gguf: Gguf | None = None
    """None where none was asked for."""

    @property
    def loss(self) -> float | None:
        return self.losses.get(self.onto)

    @property
    def drift(self) -> float | None:
        """Relative difference of the kept merge's loss from the adapter's; negative where the merge is better."""
        if self.loss is None or self.adapter_loss is None:
            return None
        return self.loss / self.adapter_loss - 1

    @property
    def within_tolerance(self) -> bool:
        return self.drift is None or abs(self.drift) <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"loss": self.loss, "drift": self.drift, "within_tolerance": self.within_tolerance}
