"""Which states of a long run to keep, so that it can be walked backwards step by step in little memory.

To reverse step t one needs the state before it. A schedule is a list of moves over T steps: store the current state,
advance it by a step, turn round at the end, restore a stored state, reverse a step. What it costs is the number of
states stored at a time and the number of steps taken again.

    all        T states, no step again
    sqrt       2√T states, almost every step once again
    binomial   about log₂ T states, every step O(log T) times again: with s states and r repetitions C(s + r, s) steps
               can be reversed, and no schedule can do more

Reference: Griewank and Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software 2000.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

Schedule = Literal["all", "sqrt", "binomial"]
Move = tuple[Literal["store", "advance", "turn", "restore", "drop", "reverse"], int]
"""What to do, and at which step: `advance` t leads from the state before step t to the one behind it."""


def moves(schedule: str, num_steps: int, slots: int | None = None) -> Iterator[Move]:
    """The moves that reverse `num_steps` steps. `slots`: states that `binomial` may hold, by default ⌈log₂ T⌉ + 1.

    Raises `ValueError` for an unknown schedule, for less than one step or one slot.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"there is no schedule {schedule!r}; known: {', '.join(get_args(Schedule))}")
    if num_steps < 1:
        raise ValueError(f"{num_steps} steps to go back through, expected at least 1")
    if slots is not None and (schedule != "binomial" or slots < 1):
        raise ValueError(f"{slots} slots for the schedule {schedule}; only binomial has them, and at least 1")
    if schedule == "binomial":
        slots = slots or math.ceil(math.log2(num_steps)) + 1
        yield "store", 0
        yield from _binomial(0, num_steps, slots - 1, last=True)
        yield "drop", 0
        return
    length = num_steps if schedule == "all" else math.ceil(math.sqrt(num_steps))
    yield from _segments(num_steps, length)


def recorded(plan: Sequence[Move], most: int) -> set[int]:
    """Which moves of `plan` are advances whose graph is to be kept for the reverse, of at most `most` graphs at a time.

    Each spares the reverse a forward pass and a gradient. Those kept for the shortest time come first.
    """
    spans, last = [], {}
    for number, (move, step) in enumerate(plan):
        if move == "advance":
            last[step] = number
        elif move == "reverse" and step in last:
            spans.append((number - last[step], last[step], number))
    chosen, alive = set(), [0] * len(plan)
    for _, start, end in sorted(spans):
        if max(alive[start:end]) < most:
            chosen.add(start)
            alive[start:end] = [count + 1 for count in alive[start:end]]
    return chosen


def _segments(num_steps: int, length: int) -> Iterator[Move]:
    """The state at the start of each segment, and every state of the segment that is being reversed."""
    starts = range(0, num_steps, length)
    for step in range(num_steps):
        if step in starts or step >= starts[-1]:
            yield "store", step
        yield "advance", step
    yield "turn", num_steps
    for start in reversed(starts):
        end = min(start + length, num_steps)
        if end < num_steps:
            yield "restore", start
            for step in range(start, end - 1):
                yield "advance", step
                yield "store", step + 1
        for step in reversed(range(start, end)):
            yield "restore", step
            yield "reverse", step
            yield "drop", step


def _binomial(start: int, end: int, slots: int, *, last: bool) -> Iterator[Move]:
    """Reverse the steps from `start`, whose state is stored and current, to `end`; `slots` more may be stored."""
    if slots == 0 or end - start == 1:
        for step in reversed(range(start, end)):
            if step < end - 1:
                yield "restore", start
            for before in range(start, step):
                yield "advance", before
            if last and step == end - 1:
                yield from _turn(step, stored=step == start)
            yield "reverse", step
        return
    middle = start + _first_part(end - start, slots)
    for step in range(start, middle):
        yield "advance", step
    yield "store", middle
    yield from _binomial(middle, end, slots - 1, last=last)
    yield "drop", middle
    yield "restore", start
    yield from _binomial(start, middle, slots, last=False)


def _turn(step: int, *, stored: bool) -> Iterator[Move]:
    """Over the last step to the end and back again."""
    if not stored:
        yield "store", step
    yield "advance", step
    yield "turn", step + 1
    yield "restore", step
    if not stored:
        yield "drop", step


def _first_part(num_steps: int, slots: int) -> int:
    """How far to go before the next state is stored; `slots` include that one."""
    repetitions = 1
    while math.comb(slots + 1 + repetitions, repetitions) < num_steps:
        repetitions += 1
    most = math.comb(slots + repetitions, slots + 1)  # steps that the first part can hold at one repetition less
    return max(1, min(most, num_steps - math.comb(slots + repetitions - 1, slots)))
