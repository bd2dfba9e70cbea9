"""The planner's values: what is trained on what, and the bytes of each part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lora_search.spec import Base
from lora_search.targets import Targets

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

LOGIT_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""Float32 logits that the engine holds at once (engine/forward.py)."""

KEPT_DENSE_BYTES = 32 << 20
"""A base on a CPU whose quantised weights take no more once de-quantised keeps them so beside the quantised ones: to
de-quantise them for every product would take up to a tenth of a step (analysis/benchmarks/NOTES.md)."""

EVALUATION_TOKENS = {"cpu": 4096, "cuda": 32_768}
"""Tokens of a pass without gradients, over all trials in it (engine/measure.py)."""

EVALUATED_TOGETHER = {"cpu": 2, "cuda": 8}
"""Trials in such a pass, each with its share of the tokens (engine/measure.py)."""

RUNTIME_BYTES = 580 << 20
"""Resident size of a host's process on a CPU without base and trials: Python, torch, transformers, peft, bitsandbytes,
and what loading a first model leaves behind. A GPU's own context is neither in this nor in
`torch.cuda.max_memory_allocated`."""

ROWS = 32
"""On a CPU the tokens of a trial in a pass, and the rows of oneDNN's other products, are rounded up to multiples of
this: oneDNN makes a kernel for every number of rows (engine/products.py)."""

PIECE_BYTES = 512 << 10
"""Of a float32 tensor, what an evaluation on a CPU has at a time in operations element by element one after the other:
with two or three more of its kind it stays in a core's own cache, of 1 to 2 MiB (engine/products.py)."""

LOGIT_COPIES = 2
"""Float32 logits at once: themselves, and what logsumexp takes while it runs, or a cap's slope."""

ALLOCATOR = {"cpu": 1.35, "cuda": 1.0}
"""Memory taken from the system for each byte in use: on a CPU, glibc's heap keeps gaps between tensors that come and
go (measured on a base of 50 M parameters, with and without checkpointing; tests/test_memory.py)."""

RULE_WIDTH = (0.2, 4.5)
"""What activations may come to, for each byte of the rule of thumb: the extremes of 28 architectures that need no rule
(small ones, all target sets, with and without dropout and checkpointing)."""


@dataclass(frozen=True)
class Setup:
    """How a base is held and computed."""

    device: Literal["cpu", "cuda"]
    compute: str
    """Dtype of the products: float32, bfloat16 or float16."""
    quantised: bool = True
    checkpointing: bool = False
    lanes: int = 1
    """Passes side by side: torch's threads on a CPU, but no more than trials; one on a GPU."""
    validation_tokens: int | None = None
    """Of the validation split, where that is known."""
    kernels: bool = True
    """On a GPU: whether the adapters have kernels (engine/fused.py), which keep no masks and make no copies."""
    gpus: int = 1
    """GPUs that the base's layers are split over."""
    gpu_bytes: int = 0
    """What each of several GPUs has to give, by which the layers are laid on them; 0: by their weights alone."""

    @classmethod
    def of(
        cls,
        base: Base,
        device: Literal["cpu", "cuda"],
        auto: str,
        *,
        lanes: int,
        validation_tokens: int | None,
        checkpointing: bool | None = None,
        kernels: bool = True,
        gpus: int = 1,
        gpu_bytes: int = 0,
    ) -> Setup:
        """As a sweep file says.

        Args:
            auto: dtype that `compute_dtype: auto` chooses on the device.
            checkpointing: None as the sweep file says.
        """
        return cls(
            device=device,
            compute=auto if base.compute_dtype == "auto" else base.compute_dtype,
            quantised=base.quantization == "nf4",
            checkpointing=base.gradient_checkpointing if checkpointing is None else checkpointing,
            lanes=lanes,
            validation_tokens=validation_tokens,
            kernels=kernels,
            gpus=gpus,
            gpu_bytes=gpu_bytes if gpus > 1 else 0,
        )

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


def with_targets_of_all(shapes: Sequence[TrialShape]) -> Sequence[TrialShape]:
    """The trials, each as if it adapted whatever one of them does."""
    sets = {shape.targets for shape in shapes}
    if len(sets) < 2:
        return shapes
    modules = {name for targets in sets for name in targets.modules}
    parameters = {name for targets in sets for name in targets.parameters}
    union = Targets(tuple(sorted(modules)), tuple(sorted(parameters)))
    return [replace(shape, targets=union) for shape in shapes]


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


@dataclass(frozen=True)
class HostBytes:
    """The most that a host holds at once, by part; of a host with several GPUs, what is on the fullest."""

    runtime: int
    """The process itself, on a CPU."""
    base: int
    trials: int
    """Adapters, gradients and optimiser state of all residents."""
    activations: int
    passing: int
    """What comes and goes: gradients on their way back, a weight made dense, masks and their products."""
    logits: int
    evaluation: int
    """What an evaluation holds besides base and trials, where that is more than training's share."""

    allocator: float
    """Bytes taken from the system for each byte of trials and work."""

    @property
    def work(self) -> int:
        """What a step or an evaluation holds, whichever holds more."""
        return max(self.activations + self.passing + self.logits, self.evaluation)

    @property
    def total(self) -> int:
        return self.runtime + self.base + math.ceil(self.allocator * (self.trials + self.work))
