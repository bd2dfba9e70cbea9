"""The live view: what a person sees on standard error while a sweep runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lora_search.errors import harmless
from lora_search.tracking.events import Observer, State

REFRESH_PER_SECOND = 4
PLAIN_EVERY_S = 10.0
"""Seconds between progress lines where there is no terminal."""

SPEED_WINDOW_S = 30.0
"""Wall time over which tokens a second are counted."""

SHOWN = ("rank", "alpha", "dropout", "target_modules", "learning_rate")


@dataclass
class _Running:
    parameters: Mapping[str, Any]
    step: int = 0
    steps_total: int = 0
    value: float | None = None
    tokens: int = 0


@dataclass
class _Progress:
    """What the view knows; a pure value apart from time."""

    planned: int
    max_steps: int
    sign: int
    running: dict[int, _Running] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=lambda: {"completed": 0, "stopped": 0, "failed": 0})
    best: tuple[float, int, Mapping[str, Any]] | None = None
    tokens: deque[tuple[float, int]] = field(default_factory=deque)
    past_ended: int = 0
    """Of those that have ended, in earlier processes."""
    past_done: float = 0.0
    """In trials, what they have done of the sweep."""
    past_tokens: dict[int, int] = field(default_factory=dict)
    """By trial that had not, its tokens as it was reported last."""

    @property
    def ended_count(self) -> int:
        return sum(self.ended.values())

    @property
    def fraction(self) -> float:
        """Of the sweep: ended trials, and running ones by their steps."""
        under_way = sum(trial.step / max(1, trial.steps_total or self.max_steps) for trial in self.running.values())
        return min(1.0, (self.ended_count + under_way) / self.planned)

    def seconds_left(self, elapsed: float) -> float | None:
        """By the pace of this process's trials so far, early stopping included; unknown until one has ended."""
        done = self.fraction - self.past_done / self.planned
        if self.ended_count == self.past_ended or done <= 0:
            return None
        return elapsed * (1 - self.fraction) / done

    def tokens_per_second(self, now: float) -> float:
        while self.tokens and self.tokens[0][0] < now - SPEED_WINDOW_S:
            self.tokens.popleft()
        if not self.tokens:
            return 0.0
        return sum(count for _, count in self.tokens) / max(1.0, now - self.tokens[0][0])


class Screen(Console):
    """Standard error, which may lose its reader; a sweep goes on without one."""

    def on_broken_pipe(self) -> None:
        self.quiet = True  # rich would end the process


class LiveView(Observer):
    """A display that renews itself where there is a terminal, plain lines where there is none."""

    def __init__(
        self,
        sweep: str,
        trials: int,
        max_steps: int,
        metric: str,
        mode: Literal["min", "max"],
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sweep = sweep
        self._metric = metric
        self._console = console or Screen(stderr=True)
        self._clock = clock
        self._start = clock()
        self._said = self._start
        self._progress = _Progress(trials, max_steps, 1 if mode == "min" else -1)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self.render,
                console=self._console,
                refresh_per_second=REFRESH_PER_SECOND,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def say(self, line: str) -> None:
        """Print one line, above the display where there is one."""
        try:
            self._console.print(escape(harmless(line)), highlight=False, soft_wrap=True)
        except OSError:  # as of a terminal that has been closed
            self._console.quiet = True

    def past(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            if row["state"] == "running":
                self._progress.past_tokens[row["trial"]] = row["tokens"] or 0
            else:
                self._progress.ended[row["state"]] += 1
                self._progress.past_ended += 1
                self._progress.past_done += 1
                self._compare(row[self._metric], row["trial"], row)

    def trial_started(self, trial: int, parameters: Mapping[str, Any]) -> None:
        self._begun(trial, parameters)

    def trial_resumed(self, trial: int, parameters: Mapping[str, Any], step: int, damaged: Sequence[str]) -> None:
        if trial not in self._progress.running:
            self._begun(trial, parameters)
            self._progress.past_done += step / self._progress.max_steps
        self._progress.running[trial].step = step
        for what in damaged:
            self.say(what)
        self.say(f"trial {trial} goes on from step {step}")

    def _begun(self, trial: int, parameters: Mapping[str, Any]) -> None:
        self._progress.running[trial] = _Running(parameters, tokens=self._progress.past_tokens.get(trial, 0))

    def trial_reported(self, trial: int, report: Mapping[str, Any]) -> None:
        progress = self._progress
        running = progress.running[trial]
        progress.tokens.append((self._clock(), report["tokens"] - running.tokens))
        running.step, running.steps_total = report["step"], report["steps_total"]
        running.value, running.tokens = report[self._metric], report["tokens"]
        self._compare(running.value, trial, running.parameters)

    def trial_ended(self, trial: int, state: State, reason: str | None) -> None:
        running = self._progress.running.pop(trial, _Running({}))
        self._progress.ended[state] = self._progress.ended.get(state, 0) + 1
        if reason is not None:
            self.say(f"trial {trial} failed at step {running.step}: {reason}")
        elif self._live is None:
            value = "" if running.value is None else f", {self._metric} {running.value:.4f}"
            self.say(f"trial {trial} {state} at step {running.step}{value} ({_short(running.parameters)})")

    def _compare(self, value: float | None, trial: int, parameters: Mapping[str, Any]) -> None:
        best = self._progress.best
        if value is not None and (best is None or self._progress.sign * value < self._progress.sign * best[0]):
            self._progress.best = (value, trial, parameters)

    def tick(self) -> None:
        if self._live is None and self._clock() - self._said >= PLAIN_EVERY_S:
            self._said = self._clock()
            self.say(self._line())

    def close(self) -> None:
        """Give the terminal back; calling it again does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def render(self) -> RenderableType:
        """The display as it stands."""
        now, progress, width = self._clock(), self._progress, self._console.width
        elapsed = now - self._start
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        left = progress.seconds_left(elapsed)
        head.add_row(
            f"[bold]{escape(self._sweep)}[/bold] {progress.ended_count}/{progress.planned} trials",
            ProgressBar(total=1.0, completed=progress.fraction),
            f"{_duration(elapsed)} passed, {_duration(left)} left",
        )
        counts = ", ".join(f"{count} {state}" for state, count in self._counts().items())
        speed = f"{progress.tokens_per_second(now):,.0f} tokens/s"
        lines: list[RenderableType] = [head, _one_line(f"{counts}; {speed}", "dim")]
        if progress.best is not None:
            value, trial, parameters = progress.best
            lines.append(_one_line(f"best: {self._metric} {value:.4f}, trial {trial} ({_short(parameters)})", "green"))
        rows = max(0, self._console.height - 8)
        if progress.running and rows and width >= 50:
            lines.append(self._running_table(rows))
        return Group(*lines)

    def _running_table(self, rows: int) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("trial", "step", self._metric, "rank", "targets", "learning rate"):
            table.add_column(name, justify="left" if name == "targets" else "right", no_wrap=True)
        for trial, running in list(self._progress.running.items())[:rows]:
            table.add_row(
                str(trial),
                f"{running.step}/{running.steps_total or self._progress.max_steps}",
                "-" if running.value is None else f"{running.value:.4f}",
                _value(running.parameters.get("rank")),
                escape(_value(running.parameters.get("target_modules"))),
                _value(running.parameters.get("learning_rate")),
            )
        return table

    def _counts(self) -> dict[str, int]:
        return {"running": len(self._progress.running), **self._progress.ended}

    def _line(self) -> str:
        now, progress = self._clock(), self._progress
        elapsed = now - self._start
        best = (
            "" if progress.best is None else f"; best {self._metric} {progress.best[0]:.4f} (trial {progress.best[1]})"
        )
        counts = ", ".join(f"{count} {state}" for state, count in self._counts().items() if count)
        return (
            f"{self._sweep}: {progress.ended_count}/{progress.planned} trials ({counts or 'starting'}){best}; "
            f"{progress.tokens_per_second(now):,.0f} tokens/s; {_duration(elapsed)} passed, "
            f"{_duration(progress.seconds_left(elapsed))} left"
        )


def _one_line(text: str, style: str) -> Text:
    """Cut where the terminal ends, never wrapped: the display keeps its height."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _short(parameters: Mapping[str, Any]) -> str:
    names = {"target_modules": "targets", "learning_rate": "lr"}
    return ", ".join(f"{names.get(key, key)} {_value(parameters[key])}" for key in SHOWN if key in parameters)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return f"{len(value)} modules"
    return "-" if value is None else harmless(str(value))


def _duration(seconds: float | None) -> str:
    """Minutes and seconds, with hours where there are some; `--` where unknown."""
    if seconds is None:
        return "--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
