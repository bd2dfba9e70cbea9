"""Who is let in next: trials that wait for room on a host, its places, and whose seats are no more.

Values only; the host says what fits.
"""

from __future__ import annotations

import asyncio
import math
import threading
from concurrent.futures import Future
from dataclasses import dataclass

FORGOTTEN_S = 600.0
"""A trial that has not asked for so long will not come any more: its seat is lost, and no other has it. From one ask to
the next it may take some steps, and evaluations, of every host that is asked between."""

PATIENCE = 4
"""So many later trials may be let in before a trial; then it goes before all others."""


@dataclass
class _Waiter:
    size: int
    since: float
    asked: float
    overtaken: int = 0
    refused_at: int = -1
    """The state of the room in which it did not fit."""


class WaitingRoom:
    """The largest trial that fits goes first, so that small ones fill what is left; but nobody waits for ever."""

    def __init__(self) -> None:
        self._waiters: dict[str, _Waiter] = {}
        self.state = 0
        """Counts the changes of the room. Who is judged notes it first: the room may change meanwhile."""

    @property
    def empty(self) -> bool:
        return not self._waiters

    def knows(self, trial: str) -> bool:
        """Whether a trial waits already, and with it its size is known."""
        return trial in self._waiters

    def may_enter(self, trial: str, size: int, *, fits: bool, judged: int, now: float, stays: bool = True) -> bool:
        """Whether a trial that asks is let in; where it is not, it waits, and asks again.

        Args:
            size: of whatever unit; only looked at where the trial does not wait yet.
            fits: whether there is room for it.
            judged: the state in which that was found; room may have been given up since, but not taken.
            now: seconds on any clock.
            stays: whether it waits in line; if not, nobody is held up for it until it asks again.
        """
        stays |= self.knows(trial)
        self._waiters = {name: other for name, other in self._waiters.items() if now - other.asked <= FORGOTTEN_S}
        waiter = self._waiters.setdefault(trial, _Waiter(size, now, now))
        waiter.asked = now
        waiter.refused_at = -1 if fits else judged
        if not fits or self._next() != trial:
            if not stays:
                self.forget(trial)
            return False
        del self._waiters[trial]
        for other in self._waiters.values():
            other.overtaken += other.since < waiter.since
        self.changed()
        return True

    def forget(self, trial: str) -> None:
        """A trial has found room elsewhere, or has ended."""
        self._waiters.pop(trial, None)

    def changed(self) -> None:
        """There is more or less room than before: who did not fit may ask again."""
        self.state += 1

    def _next(self) -> str:
        """Who waits too long already, else the largest of those that may fit."""
        overdue = [name for name, waiter in self._waiters.items() if waiter.overtaken >= PATIENCE]
        if overdue:
            return min(overdue, key=lambda name: self._waiters[name].since)
        may_fit = [name for name, waiter in self._waiters.items() if waiter.refused_at != self.state]
        return max(may_fit, key=lambda name: (self._waiters[name].size, -self._waiters[name].since))


class Places:
    """How many trials may be on a host at once, and which of them not beside others."""

    def __init__(self, most: int) -> None:
        """
        Args:
            most: trials resident at once.
        """
        self.most = most
        self._lowered: Future[None] = Future()
        """Is done when there are fewer places."""
        self._lowering = threading.Lock()
        self._shunned: set[str] = set()
        self._new: set[str] = set()
        """Residents of which no report is known yet, since they came."""
        self._alone: str | None = None
        """One of them beside which no other may come."""

    def left(self, taken: int) -> int:
        """Places for more trials, beside so many."""
        return (self.most if self._alone is None else 0) - taken

    def hold_at_most(self, trials: int | None) -> None:
        """Have no more places than so many, where that is known. From any thread."""
        with self._lowering:
            if trials and trials < self.most:
                self.most = trials
                lowered, self._lowered = self._lowered, Future()
                lowered.set_result(None)

    async def fewer(self, than: int) -> int:
        """How many there are, as soon as they are fewer."""
        while True:
            lowered = self._lowered
            if self.most < than:
                return self.most
            await asyncio.wrap_future(lowered)

    def shun(self, trial: str) -> None:
        """Have no place for a trial."""
        self._shunned.add(trial)

    def welcome(self, trial: str) -> None:
        """Have places for a trial again."""
        self._shunned.discard(trial)

    def shuns(self, trial: str) -> bool:
        return trial in self._shunned

    def suits(self, *, alone: bool) -> bool:
        """Whether a trial may come beside those that are there; one that is to be alone, where all have reported."""
        return not (alone and self._new)

    def came(self, trial: str, *, alone: bool) -> None:
        """A trial is there."""
        self._new.add(trial)
        self._alone = trial if alone else None

    def is_new_no_more(self, trial: str) -> bool:
        """A trial's report is known, or it is to be there no longer; whether that changes who may come."""
        if trial not in self._new:
            return False
        self._new.remove(trial)
        self._alone = None if trial == self._alone else self._alone
        return True


class Attempts:
    """Which of a trial's attempts, each with a seat of its own, are over: what a seat has asked for outlives it."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        """By trial, the first that is not over."""

    def begin(self, trial: str, attempt: int) -> None:
        """A trial makes an attempt: those before it are over."""
        self._first[trial] = max(attempt, self._first.get(trial, 0))

    def end(self, trial: str, attempt: int | None) -> bool:
        """An attempt is over, and all before it; None: there will be no other. False where that was known."""
        if attempt is not None and self.over(trial, attempt):
            return False
        self._first[trial] = math.inf if attempt is None else attempt + 1
        return True

    def over(self, trial: str, attempt: int) -> bool:
        return attempt < self._first.get(trial, 0)
