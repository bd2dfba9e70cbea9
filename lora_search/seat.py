"""A seat: the thin Ray Tune trainable that stands for one trial. It never imports torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle

from lora_search.checkpoint import Checkpoint, read_checkpoint, step_of, write_checkpoint
from lora_search.errors import TrialFailed
from lora_search.space import report_steps, trial_config
from lora_search.spec import SweepSpec

ADMISSION_RETRY_S = 0.05


class Seat(tune.Trainable):  # type: ignore[misc]  # Ray's base class is untyped
    """Asks a host for the next stretch of its trial and reports the result.

    Its config is `{"trial": number, "params": {name: value}}`, as the searcher proposes it.
    """

    def setup(self, config: dict[str, Any], spec: SweepSpec, hosts: Sequence[ActorHandle]) -> None:
        self._spec = spec
        self._hosts = hosts
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Stand for another trial from now on; the one before has been released by the sweep."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._trial = str(config["trial"])
        self._config = trial_config(self._spec, config["params"])
        self._steps = report_steps(self._spec, self._config)
        self._position = 0
        self._checkpoint: Checkpoint | None = None
        self._host: ActorHandle | None = None

    def step(self) -> dict[str, Any]:
        """Train up to the next report step.

        Raises:
            TrialFailed: the trial ended for a reason of its own.
        """
        if self._host is None:
            self._host = self._find_host()
        until = next(step for step in self._steps if step > self._position)
        report: dict[str, Any] = _get(self._host.advance.remote(self._trial, until))
        self._position = report["step"]
        return report | {"done": self._position >= self._steps[-1]}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        if self._host is None:
            raise TrialFailed(f"trial {self._trial} has no host to take a checkpoint from")
        write_checkpoint(_get(self._host.snapshot.remote(self._trial)), Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: dict[str, Any] | str | None) -> None:
        self._checkpoint = read_checkpoint(Path(str(checkpoint)))
        self._position = step_of(self._checkpoint)
        self._host = None

    def _find_host(self) -> ActorHandle:
        """The host with most room that admits the trial; waits while all are full."""
        while True:
            rooms: list[tuple[int, int]] = ray.get([host.room.remote() for host in self._hosts])
            for index in sorted(range(len(rooms)), key=lambda i: rooms[i], reverse=True):
                host = self._hosts[index]
                if _get(host.admit.remote(self._trial, self._config, self._checkpoint)):
                    for other in self._hosts:
                        if other is not host:
                            other.forget.remote(self._trial)
                    return host
            time.sleep(ADMISSION_RETRY_S)


def _get(reference: Any) -> Any:
    """`ray.get` that raises what the host raised, without Ray's wrapping."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TrialFailed):
            raise TrialFailed(str(error.cause)) from None
        raise
