"""Who is let in next: the largest that fits, and nobody waits for ever behind smaller ones."""

from __future__ import annotations

from lora_search.waiting import FORGOTTEN_S, PATIENCE, WaitingRoom


def test_whoever_fits_first_is_let_in() -> None:
    assert WaitingRoom().may_enter("a", 5, fits=True, now=0.0)


def test_largest_that_fits_goes_first() -> None:
    room = WaitingRoom()
    assert not room.may_enter("small", 1, fits=False, now=0.0)
    assert not room.may_enter("large", 9, fits=False, now=0.0)
    room.changed()
    assert not room.may_enter("small", 1, fits=True, now=0.1)  # the large one has not been asked since
    assert room.may_enter("large", 9, fits=True, now=0.1)
    assert room.may_enter("small", 1, fits=True, now=0.1)


def test_small_one_fills_what_is_too_little_for_the_large() -> None:
    room = WaitingRoom()
    assert not room.may_enter("large", 9, fits=False, now=0.0)
    assert room.may_enter("small", 1, fits=True, now=0.1)


def test_no_trial_waits_for_ever_behind_smaller_ones() -> None:
    room = WaitingRoom()
    assert not room.may_enter("large", 9, fits=False, now=0.0)
    let_in = 0
    for number in range(3 * PATIENCE):
        now = 0.1 * (number + 1)
        room.may_enter("large", 9, fits=False, now=now)
        let_in += room.may_enter(f"small {number}", 1, fits=True, now=now)
    assert let_in == PATIENCE
    assert room.may_enter("large", 9, fits=True, now=now)
    assert room.may_enter(f"small {PATIENCE}", 1, fits=True, now=now)  # the next that came


def test_trial_that_found_room_elsewhere_holds_nobody_up() -> None:
    room = WaitingRoom()
    assert not room.may_enter("large", 9, fits=False, now=0.0)
    room.changed()
    assert not room.may_enter("small", 1, fits=True, now=0.1)
    room.forget("large")
    assert room.may_enter("small", 1, fits=True, now=0.2)


def test_trial_whose_seat_was_lost_holds_nobody_up_for_ever() -> None:
    room = WaitingRoom()
    assert not room.may_enter("large", 9, fits=False, now=0.0)
    room.changed()
    assert not room.may_enter("small", 1, fits=True, now=0.1)
    assert room.may_enter("small", 1, fits=True, now=0.1 + FORGOTTEN_S)
