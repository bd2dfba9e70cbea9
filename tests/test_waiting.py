"""Who is let in next: the largest that fits, and nobody waits for ever behind smaller ones."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_search.waiting import FORGOTTEN_S, PATIENCE, WaitingRoom


def ask(room: WaitingRoom, trial: str, size: int, *, fits: bool, now: float, stays: bool = True) -> bool:
    """Ask, and be judged at once."""
    return room.may_enter(trial, size, fits=fits, judged=room.state, now=now, stays=stays)


def test_whoever_fits_first_is_let_in() -> None:
    assert ask(WaitingRoom(), "a", 5, fits=True, now=0.0)


def test_largest_that_fits_goes_first() -> None:
    room = WaitingRoom()
    assert not ask(room, "small", 1, fits=False, now=0.0)
    assert not ask(room, "large", 9, fits=False, now=0.0)
    room.changed()
    assert not ask(room, "small", 1, fits=True, now=0.1)  # the large one has not been asked since
    assert ask(room, "large", 9, fits=True, now=0.1)
    assert ask(room, "small", 1, fits=True, now=0.1)


def test_small_one_fills_what_is_too_little_for_the_large() -> None:
    room = WaitingRoom()
    assert not ask(room, "large", 9, fits=False, now=0.0)
    assert ask(room, "small", 1, fits=True, now=0.1)


def test_no_trial_waits_for_ever_behind_smaller_ones() -> None:
    room = WaitingRoom()
    assert not ask(room, "large", 9, fits=False, now=0.0)
    let_in = 0
    for number in range(3 * PATIENCE):
        now = 0.1 * (number + 1)
        ask(room, "large", 9, fits=False, now=now)
        let_in += ask(room, f"small {number}", 1, fits=True, now=now)
    assert let_in == PATIENCE
    assert ask(room, "large", 9, fits=True, now=now)
    assert ask(room, f"small {PATIENCE}", 1, fits=True, now=now)  # the next that came


def test_trial_is_not_overtaken_for_ever_where_each_ask_takes_minutes() -> None:
    """An ask is answered between two steps: those of a large base on cores, or an evaluation, may take long."""
    room, let_in, now = WaitingRoom(), 0, 0.0
    while not ask(room, "large", 9, fits=let_in >= PATIENCE, now=now):
        now += 120
        let_in += ask(room, f"small {now}", 1, fits=True, now=now)
        now += 120
        assert now < 3600
    assert let_in == PATIENCE


def test_trial_that_found_room_elsewhere_holds_nobody_up() -> None:
    room = WaitingRoom()
    assert not ask(room, "large", 9, fits=False, now=0.0)
    room.changed()
    assert not ask(room, "small", 1, fits=True, now=0.1)
    room.forget("large")
    assert ask(room, "small", 1, fits=True, now=0.2)


def test_trial_that_does_not_wait_in_line_holds_nobody_up_and_nobody_that_does_waits_for_it() -> None:
    room = WaitingRoom()
    assert not ask(room, "large", 9, fits=False, now=0.0, stays=False)
    room.changed()
    assert ask(room, "small", 1, fits=True, now=0.1)
    assert not ask(room, "in line", 1, fits=False, now=0.2)
    room.changed()
    assert not ask(room, "no larger", 1, fits=True, now=0.3, stays=False)
    assert ask(room, "in line", 1, fits=True, now=0.4)
    assert ask(room, "large", 9, fits=True, now=0.5, stays=False)


def test_trial_that_waits_in_line_stays_there_however_it_asks() -> None:
    room = WaitingRoom()
    assert not ask(room, "large", 9, fits=False, now=0.0)
    assert not ask(room, "large", 9, fits=False, now=0.1, stays=False)
    room.changed()
    assert not ask(room, "small", 1, fits=True, now=0.2)


def test_trial_whose_seat_was_lost_holds_nobody_up_for_ever() -> None:
    room = WaitingRoom()
    assert not ask(room, "large", 9, fits=False, now=0.0)
    room.changed()
    assert not ask(room, "small", 1, fits=True, now=0.1)
    assert ask(room, "small", 1, fits=True, now=0.1 + FORGOTTEN_S)


def test_trial_refused_before_the_room_changed_may_ask_again() -> None:
    room = WaitingRoom()
    judged = room.state
    room.changed()
    assert not room.may_enter("a", 5, fits=False, judged=judged, now=0.0)
    assert ask(room, "a", 5, fits=True, now=0.0)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(sizes=st.lists(st.integers(1, 10), min_size=1, max_size=8), draw=st.randoms(use_true_random=False))
def test_everybody_is_let_in_whatever_the_order_of_asking_and_leaving(sizes: list[int], draw: random.Random) -> None:
    """A room of 10, residents that leave at random, and verdicts that may be a change old."""
    room, inside, outside = WaitingRoom(), dict[str, int](), {str(i): size for i, size in enumerate(sizes)}
    for turn in range(400):
        for trial in draw.sample(sorted(outside), len(outside)):
            judged, fits = room.state, sum(inside.values()) + outside[trial] <= 10
            if inside and draw.random() < 0.3:
                del inside[draw.choice(sorted(inside))]
                room.changed()
            if room.may_enter(trial, outside[trial], fits=fits, judged=judged, now=turn * 0.1):
                inside[trial] = outside.pop(trial)
                assert sum(inside.values()) <= 10
        if not outside:
            return
    raise AssertionError(f"still outside: {outside}, inside: {inside}")
