"""A seat: the thin actor that stands for one trial in Ray Tune. It imports neither torch nor Ray Tune."""

from __future__ import annotations

import errno
import random
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle

from lora_search.checkpoint import Checkpoint, Shelf, step_of
from lora_search.errors import HostFailed, HostGone, TrialFailed
from lora_search.rundir import RECORDS
from lora_search.space import TrialConfig, report_steps, trial_config
from lora_search.spec import SweepSpec
from lora_search.storage import Folder, is_uri

SEAT_BYTES = 128 << 20
"""Memory of a seat, which is all that Ray is asked for: a Python process with Ray in it."""

PROPOSED = ("trial", "params", "attempt", "again", "alone")
"""What a seat's config holds: a trial's number, its values by name, how many seats of this process it had before,
whether it had any seat before, and whether no other that has not reported may be beside it on a host before it has."""

ADMISSION_RETRY_S = 0.05
"""For each ASKED_AT_ONCE hosts that a trial has asked before, and asks again."""

ASKED_AT_ONCE = 4
"""Hosts. The best of a few drawn at random is nearly as good a choice as the best of all (Mitzenmacher, The Power of
Two Choices in Randomized Load Balancing, 2001), and costs the same whatever the size of the cluster."""

LINES = 4
"""Hosts at most at which a trial waits in line. Each may keep its room for it until it asks there again, which it does
whenever it has asked a few others: were it in line everywhere, or did it ask all of them first, hosts that have room
would wait for trials that are far away, and trials be let in one by one (analysis/benchmarks/NOTES.md)."""

ANSWER_S = 5.0
"""A host that takes longer to say whether it has room is passed over, this time."""

LARGER_S = 60.0
"""Until a trial that seems too large for any host is tried: one that is large enough may be about to begin anew."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Where one node finds no room, no other will."""

GONE = (
    ray.exceptions.RayActorError,
    ray.exceptions.ActorUnschedulableError,  # it had not started yet
    ray.exceptions.OutOfMemoryError,  # Ray ended it, since the node had no memory left
)
"""What calls of a host end in that is lost, or out of reach for a moment."""


class Seat:
    """Asks a host for the next stretch of its trial and reports the result.

    Its methods are those that Ray Tune calls of a `tune.Trainable`. It is none itself: with Ray Tune, and the pandas
    that comes with it, a seat would take three times as long to start, and nearly twice the memory.

    A trial that has checkpoints goes on from the newest, whatever ended the seat that it had, or its sweep.

    A result is the engine's report of the trial, and besides:

    - done: whether the trial has come to its end.
    - checkpoint: where the trial's checkpoint of this step lies in the run directory.
    - resumed: the first time after a checkpoint was read, its step, and what was wrong with later ones.
    - failure: in place of a report, why the trial cannot go on. It is not raised, since Ray Tune tries again whatever
      raises: that is for what happens to machines.
    - unsaved: in place of a report, why the run directory cannot be read or written to.
    - node: where that is so, this seat's, which no other may share; None where it is so for all.
    """

    def __init__(self, config: dict[str, Any], spec: SweepSpec, run: Folder, hosts: str) -> None:
        """
        Args:
            config: as the searcher proposes it; its keys are PROPOSED.
            run: the run directory.
            hosts: what the names of the sweep's hosts begin with.
        """
        self._spec = spec
        self._run = run
        self._lobby = Lobby(hosts)
        self.reset(config)

    def reset(self, config: dict[str, Any]) -> bool:
        """Stand for another trial from now on; the one before has been released by the sweep. True: it can."""
        self._trial = str(config["trial"])
        self._attempt, self._again, self._alone = config["attempt"], config["again"], config["alone"]
        self._parameters = config["params"]
        self._config = trial_config(self._spec, config["params"])
        self._steps = report_steps(self._spec, self._config)
        self._shelf = Shelf(self._run, config["trial"])
        self._host: ActorHandle | None = None
        self._begun = False
        self._unsaved: str | None = None
        self._reported = -1
        return True

    def stop(self) -> None:
        """Nothing is left to be put away when the process is to end."""

    def get_auto_filled_metrics(self, *, debug_metrics_only: bool) -> dict[str, Any]:
        """What there is to say before the first result: nothing."""
        return {}

    def train(self) -> dict[str, Any]:
        """Train up to the next report step, or say once more what was reported before the trial goes on.

        Raises:
            OSError: the run directory could not be used, as has been said; on another node the trial may go on.
            HostGone: its host is no more, or fails.
        """
        if self._unsaved is not None:
            raise OSError(self._unsaved)
        news: dict[str, Any] = {}
        try:
            if not self._begun:
                news = self._recall()
                self._begun = True
            report = self._untold.popleft() if self._untold else self._advance()
        except TrialFailed as failure:
            return news | {"step": max(0, self._reported), "failure": str(failure), "done": True}
        except OSError as error:
            if isinstance(error, ray.exceptions.RayError):  # of the cluster, or raised on a host
                raise
            self._unsaved = str(error)
            node = None if error.errno in FULL else ray.get_runtime_context().get_node_id()
            return {"step": max(0, self._reported), "unsaved": self._unsaved, "node": node}
        last = self._steps[-1]
        return news | report | {"done": report["step"] >= last}

    def _recall(self) -> dict[str, Any]:
        """Go on from the newest checkpoint, if there is one; what is new about that."""
        saved = self._shelf.newest()
        if saved is None and not is_uri(self._run.place) and not set(RECORDS).intersection(self._run.names()):
            raise FileNotFoundError(errno.ENOENT, "there is no run directory", self._run.place)  # nor what lies in it
        if saved and saved.parameters not in (None, self._parameters):
            self._shelf.clear()  # of a trial that the study has lost, and whose number it has given to another
            saved = None
        self._checkpoint = saved.checkpoint if saved else None
        self._reports = list(saved.reports) if saved else []
        self._untold = deque(self._reports)
        """Whoever was to hear it may have been lost since."""
        step = step_of(self._checkpoint) if self._checkpoint is not None else 0
        # Where it stands may be a report step itself.
        self._reported = int(self._reports[-1]["step"]) if self._reports else step - 1
        return {"resumed": {"step": step, "damaged": list(saved.damaged)}} if saved else {}

    def _advance(self) -> dict[str, Any]:
        if self._host is None:
            self._host = self._lobby.admit(
                *(self._trial, self._config, self._checkpoint, self._parameters),
                attempt=self._attempt,
                again=self._again,
                alone=self._alone,
            )
            self._checkpoint = None
        until = next(step for step in self._steps if step > self._reported)
        try:
            report: dict[str, Any] = _get(self._host.advance.remote(self._trial, until))
            snapshot = _get(self._host.snapshot.remote(self._trial))
        except (*GONE, ray.exceptions.ObjectLostError, HostFailed) as error:  # or what it has answered is
            raise HostGone(self._lobby.last, why_lost(error)) from None
        report["steps_total"] = self._steps[-1]
        self._reports.append(report)
        path = self._shelf.put(snapshot, self._parameters, self._reports)
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
        self._silent: dict[str, Any] = {}
        """By host, what it was asked and has not answered."""
        self._last = ""
        """The host that admitted the last trial of this seat: where that has ended, there is room."""

    @property
    def last(self) -> str:
        """The name of the host that admitted the last trial."""
        return self._last.removeprefix(self._prefix)

    def admit(
        self,
        trial: str,
        config: TrialConfig,
        checkpoint: Checkpoint | None,
        parameters: Mapping[str, Any] | None = None,
        *,
        attempt: int = 0,
        again: bool = False,
        alone: bool = False,
    ) -> ActorHandle:
        """A host that admits the trial, of a few at a time the one with most room; waits while all are full.

        Where it seems to be too large for any, it is tried all the same, when no larger one has come for LARGER_S.

        Args:
            parameters: of the trial, as it was proposed.
            attempt: which of the trial's it is.
            again: the trial may be resident somewhere, from when it had another seat.
            alone: no other that has not reported may be beside it before it has.
        """
        given = None if checkpoint is None else ray.put(checkpoint)
        asked: set[str] = set()
        lines: set[str] = set()
        """Hosts at which it waits in line."""
        anyway, rests, large_since = False, False, time.monotonic()
        while True:
            names = self._names()
            lines &= names - self._silent.keys()
            too_small: set[str] = set()
            for name in self._as_asked(names, lines, rests=rests):
                asked.add(name)
                stays = name in lines or len(lines) < LINES
                try:
                    known = self._known[name]
                    admitted = _get(known.admit.remote(trial, config, given, parameters, alone, anyway, attempt, stays))
                except GONE:
                    continue  # lost meanwhile, or out of reach for a moment; it was nothing that this trial did
                if admitted is None:
                    too_small.add(name)
                    lines.discard(name)
                elif stays:
                    lines.add(name)
                if admitted:
                    for other in (names if again else asked) - {name}:  # it waits there, or is resident
                        if (host := self._host(other)) is not None:
                            host.release.remote(trial, attempt)
                    self._last = name
                    return known
            if not too_small or names - self._silent.keys() - too_small:
                large_since = time.monotonic()
            anyway = time.monotonic() - large_since > LARGER_S
            rests = True

    def _names(self) -> set[str]:
        names = {name for name in ray.util.list_named_actors() if name.startswith(self._prefix)}
        self._known = {name: host for name, host in self._known.items() if name in names}
        self._silent = {name: answer for name, answer in self._silent.items() if name in names}
        return names

    def _as_asked(self, names: Collection[str], lines: Collection[str], *, rests: bool) -> Iterator[str]:
        """The hosts that answer: a few at a time those with places, most room first; then full ones, to wait.

        Args:
            lines: at which of them the trial waits in line, as it stands: they are asked again before every few others.
            rests: whether it has asked all of them before, and takes its time.
        """
        others = [name for name in names if name not in lines]
        random.shuffle(others)
        others.sort(key=lambda name: name != self._last)
        full: dict[str, None] = {}
        for first in range(0, max(1, len(others)), ASKED_AT_ONCE):
            asked = [*lines, *others[first : first + ASKED_AT_ONCE]]
            if rests:
                time.sleep(ADMISSION_RETRY_S * max(1.0, len(asked) / ASKED_AT_ONCE))
            for (places, _), name in sorted(self._rooms(asked), key=lambda room: room[1] not in lines):
                if places > 0:
                    yield name
                else:
                    full[name] = None
        yield from (name for name in full if name in lines or len(lines) < LINES)

    def _rooms(self, names: list[str]) -> list[tuple[tuple[int, int], str]]:
        """What room the hosts have that answer, as they say it, and their names; the most first.

        One that has not answered is not waited for a second time: it may not run at all yet.
        """
        hosts = {name: host for name in names if (host := self._host(name)) is not None}
        asked = {name: host.room.remote() for name, host in hosts.items() if name not in self._silent}
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
        asked |= {name: self._silent[name] for name in hosts if name in self._silent}
        rooms: list[tuple[tuple[int, int], str]] = []
        for name, answer in asked.items():
            answered, _ = ray.wait([answer], timeout=0)
            if not answered:
                self._silent[name] = answer
                continue
            self._silent.pop(name, None)
            try:
                rooms.append((ray.get(answer), name))
            except GONE:
                continue
        return sorted(rooms, key=lambda pair: pair[0], reverse=True)

    def _host(self, name: str) -> ActorHandle | None:
        """None where it has died since its name was heard."""
        if name not in self._known:
            try:
                self._known[name] = ray.get_actor(name)
            except ValueError:
                return None
        return self._known[name]


def why_lost(error: Exception) -> str:
    """What became of a host, in a user's words; Ray's own are those of its parts."""
    if "running low on memory" in str(error):
        return "its node ran low on memory, and Ray ended its process"
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "it cannot be reached any more"
    if isinstance(error, ray.exceptions.ObjectLostError):
        return "its node is gone"
    if isinstance(error, ray.exceptions.ActorDiedError):
        return "its node is gone" if "its node has died" in str(error) else "its process died"
    return first_line(error)


def first_line(error: Exception) -> str:
    """Of what an error says: Ray's tell more below it."""
    return str(error).strip().splitlines()[0].rstrip(".")


def _get(reference: Any) -> Any:
    """`ray.get` that raises a trial's failure, or the host's, as the host raised it, without Ray's wrapping."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TrialFailed | HostFailed):
            raise type(error.cause)(str(error.cause)) from None
        raise
