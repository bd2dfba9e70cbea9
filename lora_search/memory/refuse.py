"""Refuse a sweep of which a trial can never fit, by the name of what makes it too large."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from lora_search.errors import InputError
from lora_search.memory.corners import Corner, smallest
from lora_search.memory.estimate import BaseMemory
from lora_search.memory.values import TrialShape
from lora_search.spec import SweepSpec

GPUS = (2, 3, 4, 6, 8)
"""Of one host, that are tried."""

SHORTEST = 64
"""Tokens of a row that still say something."""


@dataclass(frozen=True)
class _Knob:
    """A key of the sweep file that makes trials larger."""

    key: str
    found: str
    lowered: TrialShape
    """The trial with the smallest value that the key may have."""
    fitting: Callable[[], str]
    """What would fit, in words."""


def refuse_what_never_fits(
    spec: SweepSpec, memory: BaseMemory, corners: Sequence[Corner], capacity: int, device: str
) -> None:
    """Check the largest trial of each target set against a device that it has for itself.

    Args:
        capacity: bytes that a host may take.
        device: its name, for the message.

    Raises:
        InputError: a trial can never fit; names the key of the sweep file that makes it too large.
    """
    base = memory.host([]).total
    if base > capacity:
        less = "no smaller form of it" if memory.setup.quantised else "base.quantization: nf4 holds it in a quarter"
        advice = _more_gpus(memory, [], capacity) or less
        raise InputError(
            f"base.model: {spec.base.model} alone takes {_gb(base)}, and {device} has {_gb(capacity)} to give; {advice}"
        )
    for corner in reversed(corners):
        needed = memory.host([corner.shape]).total
        if needed > capacity:
            raise InputError(_message(spec, memory, corners, corner, needed, capacity, device))


def _message(
    spec: SweepSpec,
    memory: BaseMemory,
    corners: Sequence[Corner],
    corner: Corner,
    needed: int,
    capacity: int,
    device: str,
) -> str:
    shape = corner.shape
    knobs = list(_knobs(spec, memory, corners, corner, capacity))
    totals = {knob.key: memory.host([knob.lowered]).total for knob in knobs}
    helps = [knob for knob in knobs if totals[knob.key] <= capacity] or knobs
    guilty = min(helps, key=lambda knob: totals[knob.key])  # whichever frees most
    advice = guilty.fitting() if totals[guilty.key] <= capacity else "no single value of the sweep file makes it fit"
    if more := _more_gpus(memory, [shape], capacity):
        advice += f"; {more}"
    if not memory.setup.checkpointing:
        advice += "; base.gradient_checkpointing: true takes less memory for more time"
    return (
        f"{guilty.key}: found {guilty.found}; a trial of rank {shape.rank} on {corner.target} with batches of "
        f"{shape.batch_size} x {shape.length} tokens takes {_gb(needed)}, and {device} has {_gb(capacity)} to give; "
        f"{advice}"
    )


def _more_gpus(memory: BaseMemory, shapes: Sequence[TrialShape], capacity: int) -> str | None:
    """How many GPUs of that size a host needs for these trials; None where none of the usual numbers helps."""
    if memory.setup.device != "cuda":
        return None
    for gpus in (count for count in GPUS if count > memory.setup.gpus):
        try:
            if memory.over(gpus, capacity).host(shapes).total <= capacity:
                return f"hosts.gpus_per_host: {gpus} holds it, its layers split over {gpus} such GPUs"
        except InputError:  # it cannot be split so
            return None
    return None


def _knobs(
    spec: SweepSpec, memory: BaseMemory, corners: Sequence[Corner], corner: Corner, capacity: int
) -> Iterator[_Knob]:
    shape = corner.shape

    def fits(candidate: TrialShape) -> bool:
        return memory.host([candidate]).total <= capacity

    def at_most(top: int, lowered: Callable[[int], TrialShape]) -> str:
        low, high = 1, top
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(lowered(middle)) else (low, middle)
        return f"at most {low} fits"

    numbers: tuple[tuple[str, int, Callable[[int], TrialShape]], ...] = (
        (_key(spec, "rank"), shape.rank, lambda rank: replace(shape, rank=rank)),
        (_key(spec, "batch_size"), shape.batch_size, lambda rows: replace(shape, batch_size=rows)),
        ("data.max_length", shape.length, lambda length: replace(shape, length=length)),
    )
    for key, found, lowered in numbers:
        rows = key == "data.max_length"
        shown = spec.data.max_length if rows else found
        least = min(found, SHORTEST) if rows else 1
        yield _Knob(key, str(shown), lowered(least), partial(at_most, found, lowered))
    smaller = smallest(corners, memory)
    if smaller.target != corner.target:
        yield _Knob(
            _key(spec, "target_modules"),
            repr(corner.target),
            replace(shape, targets=smaller.shape.targets),
            lambda: f"{smaller.target} fits",
        )


def _key(spec: SweepSpec, name: str) -> str:
    """Where the sweep file says it, or would."""
    return f"search.space.{name}" if name in spec.search.space or name != "batch_size" else f"training.{name}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
