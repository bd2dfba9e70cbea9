"""Where a trial's numbers are dropped."""

from __future__ import annotations

import numpy as np
import pytest

from lora_search.engine.masks import LEVELS, Masks, _ascending, dropped_levels


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.125, 0.6])
def test_each_element_is_dropped_with_the_probability_whatever_its_neighbour_is(probability: float) -> None:
    count, places = 20_000, 40
    dropped = np.zeros((places, count), np.bool_)
    for place in range(places):
        positions = Masks(1, 2, 0, probability).dropped(place, count, probability)
        assert (np.diff(positions) > 0).all()
        dropped[place, positions] = True
    level = dropped_levels(probability) / LEVELS

    def near(found: np.float64, expected: float, of: int) -> bool:
        return bool(abs(found - expected) < 5 * (expected * (1 - expected) / of) ** 0.5)

    assert near(dropped.mean(), level, dropped.size)
    assert near((dropped[:, 1:] & dropped[:, :-1]).mean(), level**2, dropped.size)
    for edge in (dropped[:, :50], dropped[:, -50:]):
        assert near(edge.mean(), level, edge.size)


def test_positions_are_of_the_seed_the_step_the_part_and_the_place_alone() -> None:
    masks = Masks(1, 2, 0, 0.05)
    first = masks.dropped(3, 5_000, 0.05)
    others = [Masks(5, 2, 0, 0.05), Masks(1, 5, 0, 0.05), Masks(1, 2, 5, 0.05)]
    assert np.array_equal(first, Masks(1, 2, 0, 0.05).dropped(3, 5_000, 0.05))
    assert not any(np.array_equal(first, other.dropped(3, 5_000, 0.05)) for other in others)
    assert not np.array_equal(first, masks.dropped(4, 5_000, 0.05))
    assert np.array_equal(first[first < 100], masks.dropped(3, 100, 0.05))


@pytest.mark.parametrize("draws", [1, 7, 10_000])
def test_positions_are_the_same_however_many_are_drawn_at_a_time(draws: int) -> None:
    found, wanted = (
        _ascending(np.random.Generator(np.random.SFC64(0)), 3_000, 0.1, at_a_time) for at_a_time in (draws, 500)
    )
    assert np.array_equal(found, wanted)


def test_nothing_is_dropped_of_nothing_or_with_next_to_no_probability() -> None:
    assert not len(Masks(0, 0, 0, 0.05).dropped(0, 0, 0.05))
    assert not len(Masks(0, 0, 0, 1e-6).dropped(0, 10, 1e-6))  # below one of 65,536
