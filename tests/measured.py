"""Comparisons of numbers, and who hears how they came out: docs/make_identities.py, and otherwise nobody."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """Of a comparison that held: `found` is an error (`expected` 0, `kind` says of what kind), or an order.

    Kinds of their own: "bits" of what is equal to the bit, "apart" of what had to differ and did.
    """

    kind: str = ""
    found: float = 0.0
    tolerance: float = 0.0
    expected: float = 0.0


def nobody(outcome: Outcome) -> None:
    """Hears nothing."""


listener = nobody


def note(outcome: Outcome) -> None:
    listener(outcome)


@contextmanager
def unheard() -> Iterator[None]:
    """Comparisons in here are none of the identity's."""
    global listener
    kept, listener = listener, nobody
    try:
        yield
    finally:
        listener = kept


def within(error: Any, tolerance: float, kind: str = "") -> bool:
    """error < tolerance; relative unless `kind` calls it otherwise."""
    holds = bool(error < tolerance)
    if holds:
        note(Outcome(kind, float(error), tolerance) if error else Outcome("bits"))
    return holds


def exactly(found: Any, expected: Any) -> bool:
    """Numbers, lists of them, or a tensor and the one value of all its entries, without a difference."""
    if holds := bool(torch.as_tensor(found == expected).all()):
        note(Outcome("bits"))
    return holds


def on_average(found: Tensor, expected: Tensor, rtol: float = 0.0, atol: float = 0.0) -> bool:
    """Close as `torch.allclose` says it, of what depends on random draws."""
    with unheard():
        holds = torch.allclose(found, expected, rtol, atol)
    if holds:
        note_close(found, expected, rtol, atol, "on average")
    return holds


def differ(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """Not close; where they are, that is not what the test is about."""
    with unheard():
        holds = not torch.allclose(a, b, rtol, atol)
    if holds:
        note(Outcome("apart"))
    return holds


def is_of_order(errors: Sequence[float], steps: Sequence[float], expected: float, tolerance: float) -> bool:
    """Whether the error goes with that power of the step, by the first and the last of them."""
    found = math.log(errors[0] / errors[-1]) / math.log(steps[0] / steps[-1])
    holds = abs(found - expected) <= tolerance
    if holds:
        note(Outcome("order", found, tolerance, expected))
    return holds


def note_close(a: Tensor, b: Tensor, rtol: float, atol: float, kind: str = "") -> None:
    """The entry that used most of |a − b| ≤ atol + rtol·|b|, and whichever of the two allows more there."""
    if not b.numel():
        return
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    apart, size = (a - b).abs().nan_to_num(), b.abs()
    place = int((apart / (atol + rtol * size).clamp(min=1e-300)).argmax())
    error, scale = float(apart[place]), float(size[place])
    if not error:
        note(Outcome("bits"))
    elif rtol * scale >= atol:
        note(Outcome(kind, error / scale, rtol))
    else:
        note(Outcome(f"absolute, {kind}" if kind else "absolute", error, atol))
