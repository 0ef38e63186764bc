"""Counting the bytes that a learning rule holds between its forward and its backward half."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class HeldBytes:
    """The distinct storages held for the backward half of a step; parameters do not count."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._ignored = {_storage_key(p) for p in parameters}
        self._sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []  # a freed storage's address may be used again

    def add(self, tensor: Tensor) -> None:
        key = _storage_key(tensor)
        if key not in self._ignored and key not in self._sizes:
            self._sizes[key] = tensor.untyped_storage().nbytes()
            self._alive.append(tensor.detach())

    @property
    def total(self) -> int:
        return sum(self._sizes.values())


_meter: ContextVar[HeldBytes | None] = ContextVar("held_bytes", default=None)


def hold(tensor: Tensor) -> Tensor:
    """Declare that a rule keeps `tensor` for later without autograd's knowledge; returns it."""
    meter = _meter.get()
    if meter is not None:
        meter.add(tensor)
    return tensor


@contextmanager
def measure_held_bytes(parameters: Iterable[Tensor]) -> Iterator[HeldBytes]:
    """Within the context, count what autograd saves and what rules `hold`."""
    meter = HeldBytes(parameters)

    def pack(tensor: Tensor) -> Tensor:
        meter.add(tensor)
        return tensor

    token = _meter.set(meter)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield meter
    finally:
        _meter.reset(token)
        meter._alive.clear()


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
