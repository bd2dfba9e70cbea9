"""Dropout masks that belong to a trial: a function of its seed, its step and the place in the model.

Nothing is drawn from a generator that trials share, and nothing has to be kept between steps: a mask is the same in
whatever company the trial is trained, after a restart, and when a layer is computed a second time for its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Positions = npt.NDArray[np.int64]

LEVELS = 1 << 16
"""A mask's element is decided by 16 random bits, so that a probability is met to one part in 65,536."""


@dataclass(frozen=True)
class Masks:
    """The masks of one forward pass of one trial."""

    seed: int
    step: int
    part: int
    """Which of the step's forward passes."""
    probability: float
    """Of the adapter's dropout."""

    @property
    def key(self) -> int:
        """Of the masks that are drawn within kernels, as a signed 64-bit number; the place comes in there."""
        sequence = np.random.SeedSequence([self.seed, self.step, self.part])
        return int(sequence.generate_state(1, np.uint64).view(np.int64)[0])

    def keep(self, place: int, shape: tuple[int, ...], device: torch.device, probability: float) -> torch.Tensor:
        """True where an element stays: a boolean tensor of `shape`, for one place of the model."""
        key = np.random.SeedSequence([self.seed, self.step, self.part, place])
        count = int(np.prod(shape))
        drop = dropped_levels(probability)
        words = (count + 3) // 4
        if device.type == "cpu":
            bits = np.random.SFC64(key).random_raw(words).view(np.uint16)[:count]
            return torch.from_numpy(bits >= drop).view(shape).to(device)
        generator = torch.Generator(device).manual_seed(int(key.generate_state(1, np.uint64)[0]))
        drawn = torch.empty(words, dtype=torch.int64, device=device).random_(-(1 << 63), None, generator=generator)
        return (drawn.view(torch.int16)[:count] >= drop - LEVELS // 2).view(shape)

    def dropped(self, place: int, count: int, probability: float) -> Positions:
        """Which of `count` elements are dropped, ascending, for one place of the model.

        From one to the next it is a geometrically distributed way, so that as many numbers are drawn as elements are
        dropped.
        """
        key = np.random.SeedSequence([self.seed, self.step, self.part, place])
        drop = dropped_levels(probability) / LEVELS
        hardly_ever_too_few = int(count * drop + 6 * (count * drop) ** 0.5) + 8
        return _ascending(np.random.Generator(np.random.SFC64(key)), count, drop, hardly_ever_too_few)


def _ascending(generator: np.random.Generator, count: int, probability: float, draws: int) -> Positions:
    """Each position below `count` with this probability; drawn for so many at a time, which changes nothing."""
    if not probability:
        return np.zeros(0, np.int64)
    scale = np.float32(-1 / np.log1p(-probability))
    found: list[Positions] = []
    last = -1
    while last < count:
        ways = (generator.standard_exponential(draws, np.float32) * scale).astype(np.int64) + 1
        found.append(last + np.cumsum(ways))
        last = int(found[-1][-1])
    positions = np.concatenate(found)
    return positions[: np.searchsorted(positions, count)]


def dropped_levels(probability: float) -> int:
    """How many of the 16-bit numbers mean that an element is dropped."""
    return round(probability * LEVELS)


def survivors_scale(probability: float) -> float:
    """What the kept elements are multiplied by, so that the mean stays."""
    return LEVELS / (LEVELS - dropped_levels(probability))
