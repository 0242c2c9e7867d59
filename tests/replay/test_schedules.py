"""Schedules: valid, within their slots, and with no more steps than the closed form says."""

import functools
import math

import pytest

import bilevax as bx


def binomial(steps, slots):
    """Training steps in all, of the best schedule with so many slots (Griewank and Walther,
    proposition 1), and the one that ends."""
    repeats = next(r for r in range(steps + 1) if math.comb(slots + r, slots) >= steps)
    return repeats * steps - math.comb(slots + repeats, slots + 1) + 1


@functools.cache
def best(steps, slots):
    """The same by dynamic programming."""
    if steps == 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    return min(
        middle + best(steps - middle, slots - 1) + best(middle, slots) for middle in range(1, steps)
    )


@pytest.mark.parametrize("slots", range(1, 9))
def test_trees_are_the_best_there_are(slots):
    for steps in range(1, 41):
        counts = bx.replay.tree(slots).counts(steps)
        assert counts.executed == best(steps, slots) + 1 == binomial(steps, slots)
        assert counts.held <= slots


@pytest.mark.parametrize(
    "steps, slots, sweeps",
    [(1024, 10, 3.67), (1024, 20, 2.75), (1024, 64, 1.94), (10_000, 200, 1.98)],
)
def test_trees_of_long_trainings(steps, slots, sweeps):
    counts = bx.replay.tree(slots).counts(steps)
    assert counts == (binomial(steps, slots), slots)
    assert round(counts.executed / steps, 2) == sweeps


def test_segments_of_the_square_root():
    assert bx.replay.segments().counts(1024) == (
        2 * 1024 - 2 * 32 + 1,
        62,
    )  # the last segment is not done again, nor is each one's last step
    assert bx.replay.segments().counts(10_000) == (19_801, 198)  # as good as a tree of 200


def test_everything():
    assert bx.replay.everything().counts(1000) == (1000, 999)


@pytest.mark.parametrize(
    "schedule",
    [
        bx.replay.everything(),
        bx.replay.segments(),
        bx.replay.segments(3),
        *map(bx.replay.tree, range(1, 8)),
    ],
    ids=repr,
)
def test_actions_are_sound(schedule):
    """Each step is gone back over once, in order, at its own state; what is taken up is there;
    nothing stays."""
    for steps in range(1, 50):
        current, held, back, turns = 0, set(), [], 0
        for kind, step in schedule.actions(steps):
            if kind == "go":
                assert step > current
                current = step
            elif kind == "take":
                assert step in held
                current = step
            elif kind == "keep":
                assert step == current
                held.add(step)
            elif kind == "drop":
                held.remove(step)
            elif kind == "turn":
                assert current == step == steps - 1
                turns += 1
            else:
                assert kind == "back" and current == step
                back.append(step)
        assert back == list(range(steps - 1, -1, -1)) and not held and turns == 1


@pytest.mark.parametrize(
    "make", [lambda: bx.replay.tree(0), lambda: bx.replay.segments(0), lambda: bx.replay.tree(2.5)]
)
def test_refusals(make):
    with pytest.raises((TypeError, ValueError), match="expected an integer of at least 1"):
        make()


def test_reprs():
    assert (
        repr(bx.replay.tree(4)) == "tree(slots=4)"
        and repr(bx.replay.segments()) == "segments(length=None)"
    )
