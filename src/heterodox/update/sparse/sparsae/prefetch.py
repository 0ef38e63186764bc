"""Micro-batches that are there when they are needed: on CUDA the next one is copied while the model trains."""

import torch

from heterodox.core.services import Batches
from heterodox.core.state import Tree
from heterodox.core.types import Batch


class Prefetch:
    """Batches fetched one ahead on a stream of their own (from pinned memory); on a CPU, simply batches.

    The state is that of the batches handed out, not of the one that waits.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches = batches
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waiting: tuple[Tree, Batch] | None = None

    @property
    def examples_per_epoch(self) -> int:
        return self.batches.examples_per_epoch

    def next_batch(self) -> Batch:
        if self._stream is None:
            return self.batches.next_batch()
        if self._waiting is None:
            self.fetch()
        assert self._waiting is not None
        _, batch = self._waiting
        self._waiting = None
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        for tensor in (batch.inputs, batch.targets, batch.ids):
            tensor.record_stream(torch.cuda.current_stream(self._stream.device))
        return batch

    def fetch(self) -> None:
        """Begin to fetch the next batch, if none waits."""
        if self._stream is None or self._waiting is not None:
            return
        before = self.batches.state()
        with torch.cuda.stream(self._stream):
            self._waiting = before, self.batches.next_batch()

    def state(self) -> Tree:
        return self.batches.state() if self._waiting is None else self._waiting[0]

    def load_state(self, tree: Tree) -> None:
        self._waiting = None
        self.batches.load_state(tree)
