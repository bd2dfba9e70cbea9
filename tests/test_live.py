"""The live view: a display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

import pytest
from rich.console import Console

from lora_search.tracking.live import LiveView, Screen

PARAMETERS = {"rank": 16, "alpha": 32.0, "dropout": 0.05, "target_modules": "attention-qv", "learning_rate": 1e-3}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def report(step: int, loss: float, total: int = 90) -> dict[str, Any]:
    return {"step": step, "steps_total": total, "eval_loss": loss, "token_accuracy": -loss, "tokens": 100 * step}


def test_sweep_goes_on_where_nobody_reads() -> None:
    """As under `| head`, or when the terminal has been closed."""
    reader, writer = os.pipe()
    os.close(reader)
    terminal, other = os.openpty()
    os.close(terminal)
    for end in (writer, other):
        file = os.fdopen(end, "w", buffering=1)
        shown = view(Screen(file=file, force_terminal=False), Clock())
        for _ in range(3):
            shown.say("a line")
        with contextlib.suppress(OSError):
            file.close()


def view(console: Console, clock: Clock, **keys: Any) -> LiveView:
    return LiveView("demo", 24, 90, keys.get("metric", "eval_loss"), keys.get("mode", "min"), console, clock)


def plain() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=False, width=80), file


def rendered(shown: LiveView, width: int, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, record=True)
    console.print(shown.render())
    return console.export_text().splitlines()


def test_plain_lines_have_no_escape_codes() -> None:
    console, file = plain()
    clock = Clock()
    with view(console, clock) as shown:
        shown.trial_started(0, PARAMETERS)
        shown.trial_reported(0, report(10, 2.5))
        shown.trial_ended(0, "stopped", None)
        clock.now = 11.0
        shown.tick()
    text = file.getvalue()
    assert "\x1b" not in text
    assert text.splitlines()[0].startswith("trial 0 stopped at step 10, eval_loss 2.5000 (rank 16")
    assert "1/24 trials" in text


def test_plain_progress_comes_every_ten_seconds_at_most() -> None:
    console, file = plain()
    clock = Clock()
    with view(console, clock) as shown:
        for second in range(31):
            clock.now = float(second)
            shown.tick()
    assert len(file.getvalue().splitlines()) == 3


def test_failed_trial_says_why() -> None:
    console, file = plain()
    with view(console, Clock()) as shown:
        shown.trial_started(3, PARAMETERS)
        shown.trial_ended(3, "failed", "loss is [nan] at step 7")
    assert "trial 3 failed at step 0: loss is [nan] at step 7" in file.getvalue()


def test_trial_that_goes_on_says_from_where_and_what_was_damaged() -> None:
    console, file = plain()
    what = (
        "runs/demo/tune/trial-0003/checkpoint_000020: adapter_model.safetensors is damaged: it is not what was written"
    )
    with view(console, Clock()) as shown:
        shown.trial_resumed(3, PARAMETERS, 10, [what])
        shown.trial_ended(3, "failed", "loss is [nan] at step 12")
    assert file.getvalue().splitlines() == [
        what,
        "trial 3 goes on from step 10",
        "trial 3 failed at step 10: loss is [nan] at step 12",
    ]


@pytest.mark.parametrize(("metric", "mode", "best"), [("eval_loss", "min", 1), ("token_accuracy", "max", 1)])
def test_best_follows_the_mode(metric: str, mode: str, best: int) -> None:
    console, _ = plain()
    shown = view(console, Clock(), metric=metric, mode=mode)
    for trial, loss in enumerate((3.0, 1.0, 2.0)):
        shown.trial_started(trial, PARAMETERS)
        shown.trial_reported(trial, report(10, loss))
    assert f"trial {best} (" in "\n".join(rendered(shown, 120))


def test_expected_end_follows_the_pace_so_far() -> None:
    console, _ = plain()
    clock = Clock()
    shown = view(console, clock)
    assert "-- left" in rendered(shown, 100)[0]
    for trial in range(6):
        shown.trial_started(trial, PARAMETERS)
        shown.trial_reported(trial, report(10, 2.0))
        shown.trial_ended(trial, "stopped", None)
    clock.now = 60.0
    assert "1:00 passed, 3:00 left" in rendered(shown, 100)[0]  # 6 of 24 in a minute


def test_resumed_sweep_is_reckoned_by_what_this_process_does() -> None:
    console, _ = plain()
    clock = Clock()
    shown = view(console, clock)
    ended = [{"trial": trial, "state": "stopped", "eval_loss": 1.0} for trial in range(20)]
    shown.past([*ended, {"trial": 20, "state": "running", "eval_loss": 1.0, "tokens": 4500}])
    shown.trial_resumed(20, {}, 45, [])
    assert shown._progress.seconds_left(0.0) is None
    clock.now = 10.0
    shown.trial_reported(20, report(54, 0.9))
    assert shown._progress.tokens_per_second(20.0) == 90.0
    assert shown._progress.seconds_left(10.0) is None
    shown.trial_reported(20, report(90, 0.8))
    shown.trial_ended(20, "completed", None)
    assert shown._progress.seconds_left(10.0) == pytest.approx(10.0 * 3 / 0.5)  # half a trial in ten seconds


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 30), (50, 12), (30, 5)])
def test_display_fits_the_terminal(width: int, height: int) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=height)
    shown = view(console, Clock())
    for trial in range(20):
        shown.trial_started(trial, PARAMETERS | {"target_modules": ["q_proj"] * 32})
        shown.trial_reported(trial, report(10, 2.0))
    lines = rendered(shown, width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) <= height


def test_terminal_is_given_back() -> None:
    file = io.StringIO()
    shown = view(Console(file=file, force_terminal=True, width=80), Clock())
    with contextlib.suppress(KeyboardInterrupt), shown:
        shown.trial_started(0, PARAMETERS)
        raise KeyboardInterrupt
    shown.close()
    text = file.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again
