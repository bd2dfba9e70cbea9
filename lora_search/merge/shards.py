"""Merge shard by shard: one tensor of the base is in memory at a time, whatever the model's size.

The merged model keeps the base's own files: the same shards, the same names in them, which transformers and other tools
load as they load the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_search.errors import InputError, SweepError
from lora_search.memory.weights import quantised_names
from lora_search.merge.finite import require_finite
from lora_search.merge.names import Block, Names, parameter_names
from lora_search.merge.published import CODES, Published, Stored, in_order, write_index, write_shard
from lora_search.merge.update import Update
from lora_search.merge.values import NotByShards
from lora_search.model.precision import round_trip_nf4

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Change = Callable[[torch.Tensor], torch.Tensor]
"""From a tensor as it is published, in float32, to what it is in the merged model."""


class ShardMerge:
    """An adapter and its base, ready to be merged onto either weights."""

    def __init__(self, published: Published, skeleton: PreTrainedModel, adapter: Path, device: torch.device) -> None:
        """
        Args:
            skeleton: the base without its weights; is changed.
            device: where NF4 is made, as when the adapter was trained.

        Raises:
            NotByShards: the model has to be merged in memory.
            InputError: the adapter cannot be merged, or does not fit the base.
        """
        from transformers.pytorch_utils import Conv1D

        self._published = published
        self._device = device
        self._names = parameter_names(published.tensors, skeleton)
        self._tied = dict(getattr(skeleton, "all_tied_weights_keys", None) or {})
        self._quantised = {f"{name}.weight" for name in quantised_names(skeleton)}
        self._transposed = {f"{name}.weight" for name, m in skeleton.named_modules() if isinstance(m, Conv1D)}
        self._kept_float32 = _kept_float32(skeleton)
        self._update = Update(skeleton, adapter)
        _check(self._names, published, self._update, self._tied)
        self.untied = {tied: source for tied, source in self._tied.items() if {tied, source} & self._update.touched}
        """Parameters that were tied, and to what: the adapter changes one of them, and each needs its own numbers."""

    def write(self, out: Path, *, dequantized: bool, dtype: torch.dtype | None, say: Callable[[str], None]) -> None:
        """Write the merged weights into an empty folder.

        Args:
            dequantized: onto what NF4 makes of the weights that the quantised base holds in 4 bits.
            dtype: of the numbers on disk; None for what each tensor is published in.
            say: is told of each file that is done.
        """
        shards: dict[str, Mapping[str, Stored]] = {}
        changes = self._changes(dequantized)
        files = self._published.files
        for number, file in enumerate(files, 1):
            sources = {
                key: key for key in self._published.keys_of(file) if self._names.whole.get(key) not in self.untied
            }
            if file == files[-1]:
                sources |= {tied: self._key_of(source) for tied, source in self.untied.items()}
            tensors = {key: self._stored(key, source, file, dtype) for key, source in sources.items()}
            shards[file] = in_order(tensors)
            write_shard(out / file, shards[file], self._contents(shards[file], sources, changes))
            if len(files) > 1:
                say(f"{file}: shard {number} of {len(files)} is merged")
        write_index(out, shards)

    def _key_of(self, parameter: str) -> str:
        return next(key for key, name in self._names.whole.items() if name == parameter)

    def _stored(self, key: str, source: str, file: str, dtype: torch.dtype | None) -> Stored:
        stored = self._published.tensors[source]
        code = stored.code
        if dtype is not None and stored.dtype is not None and not self._stays_float32(key):
            code = CODES[dtype]
        return replace(stored, file=file, code=code)

    def _stays_float32(self, key: str) -> bool:
        return any(part in self._kept_float32 for part in self._names.whole.get(key, key).split("."))

    def _contents(
        self, tensors: Mapping[str, Stored], sources: Mapping[str, str], changes: Mapping[str, Change]
    ) -> Iterator[torch.Tensor]:
        for key, stored in tensors.items():
            tensor = self._published.read(sources[key])
            dtype = stored.dtype
            if dtype is None:
                yield tensor
                continue
            change = changes.get(key)
            written = (tensor if change is None else change(tensor.to(torch.float32, copy=True))).to(dtype)
            if change is not None or written.dtype != tensor.dtype:
                require_finite(key, written if change is not None else tensor, written)
            if written.shape != stored.shape:
                raise SweepError(
                    f"{key}: has the shape {tuple(written.shape)} in the adapter, {stored.shape} in the base"
                )
            yield written

    def _changes(self, dequantized: bool) -> dict[str, Change]:
        """What is done to a published tensor, by its key; nothing where it is not named."""
        quantised = self._quantised if dequantized else frozenset()
        touched = self._update.touched
        changes: dict[str, Change] = {}
        for key, parameter in [*self._names.whole.items(), *((tied, tied) for tied in self.untied)]:
            if parameter in touched or parameter in quantised:
                changes[key] = partial(self._changed, parameter, parameter in quantised, parameter in touched)
        for parameter in self._names.fused:
            if parameter in quantised:
                raise NotByShards(f"{parameter} is held in 4 bits, but published in parts")
            if parameter in touched:
                shapes = {key: self._published.tensors[key].shape for key in self._names.fused[parameter]}
                blocks = self._names.blocks(parameter, shapes, self._update.shapes[parameter])
                changes |= {key: partial(self._changed_part, block) for key, block in blocks.items()}
        return changes

    def _changed(self, parameter: str, quantised: bool, touched: bool, weight: torch.Tensor) -> torch.Tensor:
        if quantised:
            weight = self._round_trip(parameter, weight)
        if not touched:
            return weight
        experts = self._update.experts(parameter)
        if experts is None:
            return self._update.apply(parameter, weight)
        for expert in range(experts):  # one at a time: an update of all of them is as large as the layer
            weight[expert] += self._update.of_expert(parameter, expert)
        return weight

    def _changed_part(self, block: Block, weight: torch.Tensor) -> torch.Tensor:
        update = self._update.of_expert(block.parameter, block.expert or 0)
        height, width = weight.shape[::-1] if block.transposed else weight.shape
        rows = slice(block.row * height, (block.row + 1) * height)
        part = update[rows, block.column * width : (block.column + 1) * width]
        return weight.add_(part.T if block.transposed else part)

    def _round_trip(self, parameter: str, weight: torch.Tensor) -> torch.Tensor:
        """What NF4 keeps of a weight; GPT-2's Conv1D stands transposed when it is quantised."""
        stands_so = weight.to(self._device)
        if parameter in self._transposed:
            return round_trip_nf4(stands_so.T.contiguous()).T.to(weight.device)
        return round_trip_nf4(stands_so).to(weight.device)


def _check(names: Names, published: Published, update: Update, tied: Mapping[str, str]) -> None:
    """Every parameter that the adapter changes must be found among the published tensors, with its own shape."""
    found = {parameter: key for key, parameter in names.whole.items()}
    if len(found) != len(names.whole):
        raise NotByShards("two published tensors become the same parameter")
    for parameter in sorted(update.touched):
        if parameter in names.fused:
            if update.experts(parameter) is None:
                raise NotByShards(f"{parameter} is published in parts")
            continue
        key = found.get(parameter) or found.get(tied.get(parameter, ""))
        if key is None:
            raise NotByShards(f"{parameter} is not among the published weights")
        if published.tensors[key].shape != update.shapes[parameter]:
            raise InputError(
                f"base.model: {key} has the shape {published.tensors[key].shape}, "
                f"{parameter} of the configuration {update.shapes[parameter]}"
            )


def _kept_float32(model: nn.Module) -> AbstractSet[str]:
    """Names of the modules that an architecture keeps in float32 in whatever dtype it is loaded."""
    kept: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        kept |= set(getattr(model, attribute, None) or ())
    return kept
