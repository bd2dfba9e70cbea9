"""The thread on which a host trains; between two steps it does whatever else the host's engine is needed for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from lora_search.errors import HostFailed

T = TypeVar("T")


@dataclass(frozen=True)
class Goal:
    """A trial is to be trained up to a step, and then reported."""

    until: int
    report: Future[dict[str, Any]]


class TrainingThread:
    """Trains while there are goals. All other methods are any thread's."""

    def __init__(self, train: Callable[[Mapping[str, Goal]], None], fail: Callable[[Exception], None]) -> None:
        """
        Args:
            train: makes one step of every trial that has a goal, and answers those that are there.
            fail: is told of what is no trial's own trouble, but the device's, or a fault of ours.
        """
        self._train, self._fail = train, fail
        self._goals: dict[str, Goal] = {}
        self._asked: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._since: float | None = None
        threading.Thread(target=self._train_for_ever, name="training", daemon=True).start()

    @property
    def busy_with(self) -> int:
        """How many trials have a goal."""
        return len(self._goals)

    @property
    def busy_s(self) -> float:
        """Seconds for which it has been at one step, with the reports after it, or one thing that it was asked for."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def has_goal(self, trial: str) -> bool:
        return trial in self._goals

    def aim(self, trial: str, until: int) -> Future[dict[str, Any]]:
        """Give a trial a goal; what it will be answered by."""
        goal = Goal(until, Future())
        with self._wake:
            self._goals[trial] = goal
            self._wake.notify()
        return goal.report

    def answer(self, trial: str) -> Future[dict[str, Any]]:
        """A trial has a goal no more; what it is to be answered by."""
        with self._wake:
            return self._goals.pop(trial).report

    def let_go(self, trial: str) -> None:
        """A trial has a goal no more, if it had one, and nobody waits for its answer."""
        with self._wake:
            goal = self._goals.pop(trial, None)
        if goal is not None:
            goal.report.cancel()

    def stop(self, failure: HostFailed | None = None) -> None:
        """No trial has a goal any more; what those are told that had one, if anything is."""
        with self._wake:
            goals, self._goals = self._goals, {}
        for goal in goals.values() if failure is not None else ():
            goal.report.set_exception(failure)

    async def ask(self, work: Callable[[], T]) -> T:
        """Have the thread do something between two steps."""
        answer: Future[T] = Future()

        def answered() -> None:
            if not answer.set_running_or_notify_cancel():  # from here on it can be cancelled no more
                return
            try:
                answer.set_result(work())
            except BaseException as error:  # it belongs to whoever asked; the thread goes on
                answer.set_exception(error)
                if isinstance(error, HostFailed):
                    self._fail(error)

        with self._wake:
            self._asked.append(answered)
            self._wake.notify()
        return await asyncio.wrap_future(answer)

    def _train_for_ever(self) -> None:
        while True:
            self._since = None
            with self._wake:
                self._wake.wait_for(lambda: self._asked or self._goals)
                asked, self._asked = self._asked, []
                goals = dict(self._goals)
            for work in asked:
                self._since = time.monotonic()
                work()
            if asked:
                continue
            self._since = time.monotonic()
            try:
                self._train(goals)
            except Exception as error:  # a trial's own failure is a value
                self._fail(error)
