"""Bytes that a rule holds between the forward and the backward half of a step."""

from collections.abc import Iterator

from torch import Tensor

from heterodox.core.held import measure_held_bytes
from heterodox.core.protocols import Credit, LanguageModel, Objective
from heterodox.core.state import split
from heterodox.core.types import Batch


def activation_bytes(model: LanguageModel, batch: Batch, weights: Tensor, objective: Objective, credit: Credit) -> int:
    """What one `credit.signal` holds for its backward half: tensors saved by autograd and those the rule keeps.

    Parameters and the rule's own state do not count; views of one storage count once. Works on the meta device
    too, where nothing is computed. The rule must not change its state in `signal`, or be thrown away afterwards.
    """

    def lasting() -> Iterator[Tensor]:
        yield from model.parameters()
        yield from split(credit.state())[0].values()

    with measure_held_bytes(lasting()) as held:
        credit.signal(model, batch, weights, objective)
    return held.total
