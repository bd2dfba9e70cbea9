"""The planner's values: what is trained on what, and the bytes of each part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_search.targets import Targets

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

LOGIT_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""Float32 logits that the engine holds at once (engine/forward.py)."""

EVALUATION_TOKENS = {"cpu": 2048, "cuda": 32_768}
"""Tokens of a pass without gradients, over all trials in it (engine/engine.py)."""

RUNTIME_BYTES = 850 << 20
"""Resident size of a host's process before it loads a base: Python, torch, transformers, peft, bitsandbytes. A GPU's
own context is not in this, and not in `torch.cuda.max_memory_allocated`."""


@dataclass(frozen=True)
class Setup:
    """How a base is held and computed."""

    device: Literal["cpu", "cuda"]
    compute: str
    """Dtype of the products: float32, bfloat16 or float16."""
    quantised: bool = True
    checkpointing: bool = False
    lanes: int = 1
    """Passes side by side: torch's threads on a CPU, one on a GPU."""

    @property
    def working(self) -> str:
        """Dtype of adapters and activations."""
        return "float32" if self.device == "cpu" else self.compute


@dataclass(frozen=True)
class Weights:
    """A base's parameters and their bytes."""

    parameters: int
    quantised_parameters: int
    packed: int
    """Bytes of the 4-bit numbers."""
    constants: int
    """Bytes of their scales and code tables."""
    unquantised: int
    """Bytes of everything else: embeddings, output head, norms, biases, fused experts."""
    head_copy: int
    """Bytes of the output head in the compute dtype, made for each pass; 0 where it is in that dtype already."""
    vocabulary: int

    @property
    def total(self) -> int:
        """Bytes that stay for as long as the base does."""
        return self.packed + self.constants + self.unquantised


@dataclass(frozen=True)
class TrialShape:
    """What of a trial's configuration decides its bytes."""

    targets: Targets
    rank: int
    dropout: bool
    batch_size: int
    length: int
    """Tokens of a row."""

    @property
    def tokens(self) -> int:
        """Of a forward pass."""
        return self.batch_size * self.length


@dataclass(frozen=True)
class TrialBytes:
    """What a trial adds to its host."""

    trainable: int
    """Parameters, not bytes."""
    adapter: int
    """Float32 parameters, and the working copy where products are in another dtype."""
    gradient: int
    optimizer: int
    """Adam's two moments, in float32."""
    activations: int
    """Kept from the forward for the backward pass."""
    passing: int
    """What comes and goes with its tokens on the way back, above `activations`."""

    @property
    def state(self) -> int:
        """Bytes for as long as the trial is resident."""
        return self.adapter + self.gradient + self.optimizer

    @property
    def total(self) -> int:
        return self.state + self.activations + self.passing
