"""Schedules reverse every step once, from the right state, within the memory that they promise."""

import math
from functools import cache

import pytest

from heterodox.meta.gradient import moves, recorded

LENGTHS = [*range(1, 12), 16, 17, 37, 64, 100, 256, 1500]


def walk(schedule: str, num_steps: int, slots: int | None = None) -> tuple[int, int]:
    """The most states stored at a time and the number of advances, after checking that every move is legal."""
    current, stored, reversed_steps, most, advances, turned = 0, set(), [], 0, 0, False
    for move, step in moves(schedule, num_steps, slots):
        match move:
            case "store":
                assert step == current
                assert step not in stored
                stored.add(step)
                most = max(most, len(stored))
            case "advance":
                assert step == current
                current, advances = current + 1, advances + 1
            case "turn":
                assert current == step == num_steps
                turned = True
            case "restore":
                assert step in stored
                current = step
            case "drop":
                stored.remove(step)
            case "reverse":
                assert turned
                assert step == current
                reversed_steps.append(step)
    assert reversed_steps == list(reversed(range(num_steps)))
    assert not stored
    return most, advances


@pytest.mark.parametrize("num_steps", LENGTHS)
def test_what_each_schedule_costs(num_steps):
    assert walk("all", num_steps) == (num_steps, num_steps)
    most, advances = walk("sqrt", num_steps)
    assert most <= 2 * math.ceil(math.sqrt(num_steps))
    assert advances < 2 * num_steps
    most, advances = walk("binomial", num_steps)
    assert most <= math.ceil(math.log2(num_steps)) + 2  # one for the turn
    assert advances <= num_steps * (1 + math.log2(num_steps) / 2)


@cache
def fewest(num_steps: int, slots: int) -> int:
    """Advances that reversing needs with `slots` states besides the first, the last step's own aside."""
    if num_steps == 1:
        return 0
    if slots == 0:
        return num_steps * (num_steps - 1) // 2
    return min(m + fewest(num_steps - m, slots - 1) + fewest(m, slots) for m in range(1, num_steps))


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 13, 30])
def test_no_schedule_of_as_many_slots_advances_less(num_steps, slots):
    assert walk("binomial", num_steps, slots)[1] == fewest(num_steps, slots - 1) + 1
    assert walk("binomial", num_steps, slots)[0] <= slots + 1


def test_at_four_times_the_steps():
    assert walk("sqrt", 1024)[0] == 2 * walk("sqrt", 256)[0] + 1 == 63
    assert walk("binomial", 1024)[0] <= walk("binomial", 256)[0] + 2 <= 12
    assert walk("binomial", 256, 4)[0] == walk("binomial", 64, 4)[0]


@pytest.mark.parametrize("most", [0, 1, 3, 8, 64])
@pytest.mark.parametrize("schedule", ["all", "sqrt", "binomial"])
def test_graphs_are_kept_from_the_last_advance_to_the_reverse(schedule, most):
    plan = list(moves(schedule, 64))
    chosen = recorded(plan, most)
    alive, highest = set(), 0
    for number, (move, step) in enumerate(plan):
        if move == "advance":
            assert step not in alive  # never computed again while it is kept
            alive |= {step} if number in chosen else set()
        alive -= {step} if move == "reverse" else set()
        highest = max(highest, len(alive))
    assert not alive
    assert highest == min(most, {"all": 64, "sqrt": 15, "binomial": 8}[schedule])
    spared = {"all": most, "sqrt": 8 + 7 * 7 if most == 8 else None}.get(schedule)
    assert spared in (None, len(chosen))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("all", 0), "0 steps to go back through"),
        (("spiral", 3), "no schedule 'spiral'"),
        (("sqrt", 3, 2), "2 slots for the schedule sqrt"),
        (("binomial", 3, 0), "0 slots for the schedule binomial"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        list(moves(*arguments))
