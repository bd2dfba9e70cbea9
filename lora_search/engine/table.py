"""Where a pack's adapters are, as numbers on the device: what the kernels read.

Of every part of the pack (T) and every entrance (G) a row: the head (the part's first token and the one behind its
last, the key of its masks, how many of 65,536 levels are dropped, its scale), then four numbers for A of all layers
behind the entrance, and four for B of each (`FlatAdapter.records`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lora_search.engine.adapter import Places
from lora_search.engine.masks import dropped_levels
from lora_search.engine.pack import Pack, Part

START, STOP, KEY, DROP, SCALE = range(5)
HEAD = 5
"""Numbers before an entrance's own."""

RANKS, COLUMN = 2, 3
"""Of a record's four."""


@dataclass(frozen=True)
class Table:
    """One entrance's share of a pack's table."""

    on_device: torch.Tensor
    """int64 (T, G * numbers of a row)."""
    stride: int
    """Between parts."""
    at: int
    """Where the entrance's rows begin."""
    most: tuple[int, ...]
    """The highest rank that any part has of each record; 0 where nobody is adapted."""
    aligned: bool
    """Whether every matrix, and every trial's columns of W, begin at a multiple of 16 bytes."""
    drops: bool
    """Whether any part drops anything."""
    longest: int
    """Tokens of the longest part."""

    @property
    def parts(self) -> int:
        return len(self.on_device)

    def ranks(self, record: int) -> int:
        return self.most[record]


def tables(pack: Pack, device: torch.device) -> dict[Places, Table]:
    """Of every entrance; made once a pack and device."""
    found: dict[Places, Table] | None = pack.tables.get(device)
    if found is None:
        found = pack.tables[device] = _tables(pack, device)
    return found


def _tables(pack: Pack, device: torch.device) -> dict[Places, Table]:
    adapters = [part.share.adapter for part in pack.parts]
    groups = next((adapter.groups for adapter in adapters if adapter is not None), ())
    if not groups:
        return {}
    shape = next(adapter.records.shape for adapter in adapters if adapter is not None)
    records = np.stack([np.zeros(shape, np.int64) if a is None else a.records for a in adapters])  # (T, G, records, 4)
    heads = np.array([_head(part) for part in pack.parts])
    parts, entrances = records.shape[:2]
    rows = np.concatenate(
        [np.broadcast_to(heads[:, None], (parts, entrances, HEAD)), records.reshape(parts, entrances, -1)], -1
    )
    numbers = rows.shape[-1]
    on_host = torch.from_numpy(rows.reshape(parts, -1))
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    on_device = on_host.to(device, non_blocking=True)
    most = records[..., RANKS].max(0)
    bad = (records[..., :RANKS] % 16 != 0).any((0, 2, 3)) | (records[..., COLUMN] % 8 != 0).any((0, 2))
    drops = bool(heads[:, DROP].any())
    longest = int((heads[:, STOP] - heads[:, START]).max())
    return {
        places: Table(on_device, entrances * numbers, g * numbers, tuple(most[g].tolist()), not bad[g], drops, longest)
        for g, places in enumerate(groups)
    }


def _head(part: Part) -> list[int]:
    share = part.share
    key = 0 if share.masks is None else share.masks.key
    scale = int(np.float32(share.scale).view(np.int32))
    return [part.tokens.start, part.tokens.stop, key, dropped_levels(share.dropout), scale]
