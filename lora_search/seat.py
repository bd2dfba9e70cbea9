"""A seat: the thin Ray Tune trainable that stands for one trial. It never imports torch."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle

from lora_search.checkpoint import Checkpoint, Shelf, step_of
from lora_search.errors import TrialFailed
from lora_search.space import TrialConfig, report_steps, trial_config
from lora_search.spec import SweepSpec
from lora_search.storage import Folder

ADMISSION_RETRY_S = 0.05

ANSWER_S = 5.0
"""A host that takes longer to say whether it has room is passed over, this time."""


class Seat(tune.Trainable):  # type: ignore[misc]  # Ray's base class is untyped
    """Asks a host for the next stretch of its trial and reports the result.

    Its config is `{"trial": number, "params": {name: value}}`, as the searcher proposes it. A trial that has
    checkpoints goes on from the newest, whatever ended the seat, or the sweep, that it had before.

    A result is the engine's report of the trial, and besides:

    - checkpoint: where the trial's checkpoint of this step lies in the run directory.
    - resumed: the first time after a checkpoint was read, its step, and what was wrong with later ones.
    - failure: in place of a report, why the trial cannot go on. It is not raised, since Ray Tune tries again whatever
      raises: that is for what happens to machines.
    - unsaved: in place of a report, why the run directory cannot be read or written to.
    """

    def setup(self, config: dict[str, Any], spec: SweepSpec, run: Folder, hosts: str) -> None:
        """
        Args:
            run: the run directory.
            hosts: what the names of the sweep's hosts begin with.
        """
        self._spec = spec
        self._run = run
        self._lobby = Lobby(hosts)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Stand for another trial from now on; the one before has been released by the sweep."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._trial = str(config["trial"])
        self._parameters = config["params"]
        self._config = trial_config(self._spec, config["params"])
        self._steps = report_steps(self._spec, self._config)
        self._shelf = Shelf(self._run, config["trial"])
        self._host: ActorHandle | None = None
        self._begun = False
        self._reported = -1

    def step(self) -> dict[str, Any]:
        """Train up to the next report step, or say once more what was reported before the trial goes on."""
        news: dict[str, Any] = {}
        try:
            if not self._begun:
                news = self._recall()
                self._begun = True
            report = self._untold.popleft() if self._untold else self._train()
        except TrialFailed as failure:
            return news | {"step": max(0, self._reported), "failure": str(failure), "done": True}
        except OSError as error:
            return news | {"step": max(0, self._reported), "unsaved": str(error)}
        last = self._steps[-1]
        return news | report | {"done": report["step"] >= last}

    def _recall(self) -> dict[str, Any]:
        """Go on from the newest checkpoint, if there is one; what is new about that."""
        saved = self._shelf.newest()
        if saved and saved.parameters not in (None, self._parameters):
            saved = None  # of a trial that the study has lost, and whose number it has given to another
        self._checkpoint = saved.checkpoint if saved else None
        self._reports = list(saved.reports) if saved else []
        self._untold = deque(self._reports)
        """Whoever was to hear it may have been lost since."""
        step = step_of(self._checkpoint) if self._checkpoint is not None else 0
        self._reported = step if self._reports else step - 1  # what is between the two may be a report step itself
        return {"resumed": {"step": step, "damaged": list(saved.damaged)}} if saved else {}

    def _train(self) -> dict[str, Any]:
        if self._host is None:
            self._host = self._lobby.admit(self._trial, self._config, self._checkpoint)
            self._checkpoint = None
        until = next(step for step in self._steps if step > self._reported)
        report: dict[str, Any] = _get(self._host.advance.remote(self._trial, until))
        report["steps_total"] = self._steps[-1]
        self._reports.append(report)
        path = self._shelf.put(_get(self._host.snapshot.remote(self._trial)), self._parameters, self._reports)
        self._reported = until
        return report | {"checkpoint": path}


class Lobby:
    """The hosts of a sweep, which come and go: they are named actors."""

    def __init__(self, prefix: str) -> None:
        """
        Args:
            prefix: what their names begin with.
        """
        self._prefix = prefix
        self._known: dict[str, ActorHandle] = {}

    def admit(self, trial: str, config: TrialConfig, checkpoint: Checkpoint | None) -> ActorHandle:
        """The host with most room that admits the trial; waits while all are full."""
        given = None if checkpoint is None else ray.put(checkpoint)
        while True:
            hosts = self._by_room()
            for host in hosts:
                try:
                    admitted = _get(host.admit.remote(trial, config, given))
                except ray.exceptions.RayActorError:
                    continue  # lost meanwhile
                if admitted:
                    for other in hosts:
                        if other is not host:
                            other.release.remote(trial)  # it waits there; or trained there, for a seat that was lost
                    return host
            time.sleep(ADMISSION_RETRY_S)

    def _by_room(self) -> list[ActorHandle]:
        """The hosts that answer, the one with most room first."""
        asked = {host.room.remote(): host for host in self._hosts()}
        answers, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
        rooms: list[tuple[tuple[int, int], ActorHandle]] = []
        for answer in answers:
            try:
                rooms.append((ray.get(answer), asked[answer]))
            except ray.exceptions.RayActorError:
                continue
        return [host for _, host in sorted(rooms, key=lambda pair: pair[0], reverse=True)]

    def _hosts(self) -> list[ActorHandle]:
        names = [name for name in ray.util.list_named_actors() if name.startswith(self._prefix)]
        self._known = {name: host for name, host in self._known.items() if name in names}
        for name in names:
            if name not in self._known:
                try:
                    self._known[name] = ray.get_actor(name)
                except ValueError:  # it has died since
                    continue
        return list(self._known.values())


def _get(reference: Any) -> Any:
    """`ray.get` that raises a trial's failure as the host raised it, without Ray's wrapping."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TrialFailed):
            raise TrialFailed(str(error.cause)) from None
        raise
