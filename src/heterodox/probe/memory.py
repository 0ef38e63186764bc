"""Bytes that a rule holds between the forward and the backward half of a step."""

from collections.abc import Iterator

from torch import Tensor

from heterodox.core.held import measure_held_bytes
from heterodox.core.protocols import Credit, LanguageModel, Objective
from heterodox.core.state import split
from heterodox.core.types import Batch


def activation_bytes(model: LanguageModel, batch: Batch, weights: Tensor, objective: Objective, credit: Credit) -> int:
    """The most bytes that one `credit.signal` holds at a time for its backward half.

    Tensors saved by autograd and those that the rule keeps count, views of one storage once; the model's parameters and
    buffers and the rule's own state do not. Works on fake tensors too, where nothing is computed. A rule that changes
    its state in `signal` has changed it afterwards.
    """

    def lasting() -> Iterator[Tensor]:
        yield from model.parameters()
        yield from model.buffers()
        yield from split(credit.state())[0].values()

    with measure_held_bytes(lasting()) as held:
        credit.signal(model, batch, weights, objective)
    return held.peak
