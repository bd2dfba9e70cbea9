"""A model's weights as they are published: safetensors files, of which one tensor is read at a time.

A shard is written the same way, tensor by tensor, so that neither reading nor writing holds more than one of them. The
format: eight bytes that say how long the header is, the header in JSON, and the tensors' bytes without gaps
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lora_search.errors import InputError, SweepError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The floating-point numbers that are cast, by safetensors' names of them; all others stay as they are."""

CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    file: str
    shape: tuple[int, ...]
    code: str
    """Its dtype, by safetensors' name of it."""

    @property
    def dtype(self) -> torch.dtype | None:
        """None where it is none that is cast."""
        return DTYPES.get(self.code)


@dataclass(frozen=True)
class Published:
    """The weights of a model folder."""

    folder: Path
    files: tuple[str, ...]
    tensors: Mapping[str, Stored]

    def read(self, key: str) -> torch.Tensor:
        """One tensor; its file is mapped for as long as the tensor lives, and only its own pages are read."""
        with safe_open(self.folder / self.tensors[key].file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(key)
            return tensor

    def keys_of(self, file: str) -> list[str]:
        return [key for key, stored in self.tensors.items() if stored.file == file]

    @property
    def numbers(self) -> int:
        """How many numbers there are in all tensors."""
        return sum(_numel(stored.shape) for stored in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(_numel(stored.shape) * CODE_BYTES[stored.code] for stored in self.tensors.values())


def published_weights(folder: Path) -> Published:
    """What is in a model folder; reads the files' headers alone.

    Raises:
        InputError: it has no safetensors, or a file of its index is missing or damaged.
    """
    files = _files(folder)
    tensors: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no mapping
                    part = opened.get_slice(key)
                    tensors[key] = Stored(file, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise InputError(f"base.model: {folder / file} cannot be read: {error}") from None
    return Published(folder, files, tensors)


def _files(folder: Path) -> tuple[str, ...]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"base.model: {index} cannot be read: {error}") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
                raise InputError(f"base.model: {index}: found {name!r}, which is no name of a file beside it")
        return tuple(sorted(names))
    if (folder / WEIGHTS).is_file():
        return (WEIGHTS,)
    pickled = any(folder.glob("pytorch_model*.bin"))
    found = "pytorch_model.bin, a pickle, which is never opened" if pickled else "none"
    raise InputError(f"base.model: {folder}: needs weights in safetensors ({WEIGHTS} or {INDEX}); found {found}")


def write_shard(file: Path, tensors: Mapping[str, Stored], contents: Iterable[torch.Tensor]) -> None:
    """Write a safetensors file of tensors that come one by one.

    Args:
        tensors: their shapes and dtypes, in the order of `contents` (see `in_order`).

    Raises:
        SweepError: what was written is not what was announced.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, stored in tensors.items():
        end = start + _numel(stored.shape) * CODE_BYTES[stored.code]
        header[key] = {"dtype": stored.code, "shape": list(stored.shape), "data_offsets": [start, end]}
        start = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as output:
        output.write(struct.pack("<Q", len(head)) + head)
        for content in contents:
            output.write(content.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    try:
        with safe_open(file, framework="pt") as opened:
            complete = set(opened.keys()) == set(tensors)
    except SafetensorError as error:
        raise SweepError(f"{file}: was not written as a safetensors file: {error}") from None
    if not complete:
        raise SweepError(f"{file}: does not hold the tensors that were written")


def in_order(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The order in which a file holds tensors: the widest numbers first, so that each is aligned."""
    return dict(sorted(tensors.items(), key=lambda item: (-CODE_BYTES[item[1].code], item[0])))


def write_index(folder: Path, shards: Mapping[str, Mapping[str, Stored]]) -> None:
    """The index of a folder of several shards; nothing for one that transformers finds by its name."""
    if list(shards) == [WEIGHTS]:
        return
    sizes = [_numel(s.shape) * CODE_BYTES[s.code] for tensors in shards.values() for s in tensors.values()]
    weight_map = {key: file for file, tensors in shards.items() for key in tensors}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


CODE_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of a number, by safetensors' names of them."""


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
