"""A trial's own stream of random numbers, for initialisation and dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomStream:
    """The state of torch's generators as one trial left them.

    PEFT and the models draw from torch's global generators. Whoever runs inside of `active` draws from the trial's
    stream instead, and leaves the global ones as they were: what ran before or beside a trial never shows in it.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        outside = self._capture()
        torch.manual_seed(seed)
        self.state = self._capture()
        self._restore(outside)

    @contextmanager
    def active(self) -> Iterator[None]:
        outside = self._capture()
        self._restore(self.state)
        try:
            yield
        finally:
            self.state = self._capture()
            self._restore(outside)

    def _capture(self) -> dict[str, torch.Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def _restore(self, state: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self._device)
