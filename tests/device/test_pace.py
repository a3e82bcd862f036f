"""The number of cores that steps of one size get: what periods tell, and no longer than they do."""

import pytest

from minisgl.device.pace import AGAIN, BLOCK, TRIALS, Pace


def served(pace: Pace, steps: int, seconds: dict[bool, float]) -> list[bool]:
    """Whether each of so many steps in a row has one core, where they take so long."""
    chosen, period = [], None
    for _ in range(steps):
        chosen.append(pace.on_one(period))
        period = seconds[chosen[-1]]
    return chosen


TRIAL = 2 * TRIALS * BLOCK


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_is_chosen_and_tried_again(faster):
    pace = Pace()
    chosen = served(pace, AGAIN * BLOCK - 1, {faster: 2e-4, not faster: 3e-4})
    assert set(chosen[:TRIAL]) == {True, False}
    assert set(chosen[TRIAL:]) == {faster}
    again = served(pace, AGAIN * BLOCK - 1, {faster: 3e-4, not faster: 2e-4})  # the machine changed
    assert set(again[TRIAL:]) == {not faster}


def test_little_difference_is_none():
    assert not any(served(Pace(), 2 * TRIAL, {True: 2.95e-4, False: 3e-4})[TRIAL:])


def test_long_steps_are_not_tried():
    pace = Pace()
    assert not any(served(pace, AGAIN * BLOCK - 1, {True: 1.0, False: 0.02}))
    chosen = served(pace, AGAIN * BLOCK, {True: 2e-4, False: 3e-4})  # they may become short
    assert any(chosen)


def test_steps_that_follow_others_do_not_count():
    pace = Pace()
    for _ in range(10 * TRIAL):
        assert not pace.on_one(None)
