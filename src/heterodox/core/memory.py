"""Activation memory: the most bytes that are saved for a backward pass."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from heterodox.core.protocols import Credit, LanguageModel, Objective
from heterodox.core.state import split
from heterodox.core.types import Batch

# Counting the bytes that a learning rule holds between its forward and its backward half.


class HeldBytes:
    """The bytes of distinct storages held for the backward half of a step, now and at the peak."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        self._ignored = {_storage_key(tensor) for tensor in ignored}
        self._holders: dict[int, int] = {}
        self._now = 0
        self.peak = 0

    def add(self, tensor: Tensor, holder: object) -> None:
        """Count `tensor`'s storage for as long as `holder`, which must keep the tensor, lives."""
        key, size = _storage_key(tensor), tensor.untyped_storage().nbytes()
        if key in self._ignored:
            return
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self._now += size
            self.peak = max(self.peak, self._now)
        weakref.finalize(holder, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self._now -= size


class _Saved:
    """What autograd keeps in place of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


_meter: ContextVar[HeldBytes | None] = ContextVar("held_bytes", default=None)


def hold(tensor: Tensor) -> Tensor:
    """Declare that a rule keeps `tensor` (this very object) for later without autograd's knowledge; returns it."""
    meter = _meter.get()
    if meter is not None:
        meter.add(tensor, tensor)
    return tensor


@contextmanager
def measure_held_bytes(ignored: Iterable[Tensor]) -> Iterator[HeldBytes]:
    """Within the context, count what autograd saves and what rules `hold`, but for the storages of `ignored`."""
    meter = HeldBytes(ignored)

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())  # the tensor itself may be of the very node that saves it: a cycle
        meter.add(tensor, saved)
        return saved

    token = _meter.set(meter)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            yield meter
    finally:
        _meter.reset(token)


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# Bytes that a rule holds between the forward and the backward half of a step.


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
