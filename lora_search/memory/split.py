"""Which of a host's GPUs each part of a base lies on: decoder blocks in their order, and all else on the first.

Embeddings, output head and what else stands outside of the blocks are on one GPU, tied or not: tokens come in there,
and losses are taken there. Between two GPUs nothing moves but what one block gives to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from lora_search.errors import InputError
from lora_search.memory.values import LOGIT_BYTES, LOGIT_COPIES, Setup
from lora_search.memory.weights import parameter_bytes, weigh

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """A base over the GPUs of a host."""

    blocks: str
    """Name of the list of decoder blocks."""
    spans: tuple[range, ...]
    """The blocks on each GPU, by number; none is empty."""
    base: tuple[int, ...]
    """Bytes of the base on each GPU."""
    rest: tuple[str, ...]
    """Modules, and tensors of no such module, that hold no block; they are on the first GPU."""

    def device_map(self, devices: Sequence[T]) -> dict[str, T]:
        """Where each part goes, as transformers and accelerate take it.

        Every block and all of the rest are named: an entry "" for the rest makes accelerate 1.15 put the whole model
        on one of the devices first, and without a block's own entry transformers 5 takes that of another whose name
        its own begins with (layers.1 and layers.10).
        """
        blocks = {
            f"{self.blocks}.{index}": device for device, span in zip(devices, self.spans, strict=True) for index in span
        }
        return dict.fromkeys(self.rest, devices[0]) | blocks

    def gpu_of(self, name: str) -> int:
        """The GPU, by number, of the module or parameter with this name."""
        prefix = f"{self.blocks}."
        if not name.startswith(prefix):
            return 0
        block = int(name.removeprefix(prefix).partition(".")[0])
        return next(gpu for gpu, span in enumerate(self.spans) if block in span)


def split_base(model: PreTrainedModel, setup: Setup) -> Split:
    """Give each of `setup.gpus` GPUs its blocks, so that as many trials as can be fit on the fullest.

    Trials take of each GPU by its blocks: each block counts as its weights, and an equal part of what the base leaves
    of all GPUs' bytes.

    Args:
        model: a skeleton.

    Raises:
        InputError: the model cannot be split over so many; says why, and names `hosts.gpus_per_host`.
    """
    found = decoder_blocks(model)
    kind = type(model).__name__
    if found is None or len(found[1]) < setup.gpus:
        blocks = 0 if found is None else len(found[1])
        raise InputError(
            f"hosts.gpus_per_host: found {setup.gpus}; {kind} has {blocks} decoder blocks to lay on them; "
            f"allowed: at most {max(1, blocks)}"
        )
    name, layers = found
    prefix = f"{name}."
    _refuse_shared(model, prefix, kind, setup.gpus)
    sizes = [0] * len(layers)
    for parameter, size in parameter_bytes(model, setup).items():
        if parameter.startswith(prefix):
            sizes[int(parameter.removeprefix(prefix).partition(".")[0])] += size
    weights = weigh(model, setup)
    rest = weights.total - sum(sizes)
    first = rest + weights.head_copy + LOGIT_COPIES * LOGIT_BYTES[setup.device]
    free = max(0, setup.gpus * setup.gpu_bytes - first - sum(sizes))
    spans = balance([size + free // len(sizes) for size in sizes], first, setup.gpus)
    base = [sum(sizes[span.start : span.stop]) for span in spans]
    base[0] += rest
    return Split(name, spans, tuple(base), tuple(_outside(model, "", name)))


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and list of a model's blocks: of the lists of modules that stand in no other, the one with most in it."""
    from torch import nn

    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    return max(outer.items(), key=lambda pair: sum(p.numel() for p in pair[1].parameters()), default=None)


def balance(sizes: Sequence[int], first: int, parts: int) -> tuple[range, ...]:
    """Cut a row of sizes into so many stretches, none empty, with the largest sum as small as it can be.

    Args:
        first: what the first stretch holds besides.
    """
    # Of each number of stretches and of leading sizes: the least largest sum, and where the last stretch begins.
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)
    best = [{end: (first + total[end], 0) for end in range(1, len(sizes) + 1)}]
    for part in range(1, parts):
        best.append(
            {
                end: min((max(best[-1][start][0], total[end] - total[start]), start) for start in range(part, end))
                for end in range(part + 1, len(sizes) + 1)
            }
        )
    spans: list[range] = []
    end = len(sizes)
    for found in reversed(best):
        start = found[end][1]
        spans.insert(0, range(start, end))
        end = start
    return tuple(spans)


def _outside(module: nn.Module, prefix: str, blocks: str) -> Iterator[str]:
    """The largest modules that hold no block, and the tensors that lie beside them."""
    for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield prefix + name
    for name, child in module.named_children():
        if blocks.startswith(f"{prefix}{name}."):
            yield from _outside(child, f"{prefix}{name}.", blocks)
        elif prefix + name != blocks:
            yield prefix + name


def _refuse_shared(model: PreTrainedModel, prefix: str, kind: str, gpus: int) -> None:
    """A weight that two blocks share can be on one GPU alone."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        if owners.setdefault(id(parameter), owner) != owner:
            raise InputError(
                f"hosts.gpus_per_host: found {gpus}; decoder blocks of {kind} share {name} with other parts of it, so "
                "that they cannot be on different GPUs; allowed: 1"
            )
