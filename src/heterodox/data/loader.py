"""Batches: windows of tokens in an order that is a pure function of the seed."""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from heterodox.core.errors import CorpusError, RecipeError
from heterodox.core.rng import Streams
from heterodox.core.types import Batch, LabelledBatch
from heterodox.data.dataset import Examples, Split


class Windows:
    """The examples of a split: example i has the inputs `tokens[i·context : (i+1)·context]`.

    Targets lie one token later, so every token but the split's first is predicted once (a rest of fewer than
    `context` tokens at the end is left over). Raises CorpusError if there is not one example.
    """

    def __init__(self, split: Split, context: int, device: str = "cpu") -> None:
        if context < 1:
            raise RecipeError(f"the context is {context}, expected at least 1 token")
        self.count = (len(split.tokens) - 1) // context
        if self.count < 1:
            raise CorpusError(
                f"the {split.name} split has {len(split.tokens)} tokens; context {context} needs at least "
                f"{context + 1}; take a larger corpus, a shorter context, or a larger share in data.splits"
            )
        tokens = np.asarray(split.tokens)
        self._inputs = tokens[: self.count * context].reshape(self.count, context)
        self._targets = tokens[1 : self.count * context + 1].reshape(self.count, context)
        self._device = device
        self._labels = split.labels
        if self._labels is not None and split.label_window != context:
            raise RecipeError(
                f"data.corruption.window is {split.label_window}, but the model's context is {context}: an example "
                "would be noisy in part; make them equal"
            )
        self._chosen = None if split.examples is None else _checked(split.examples, self.count, context, split.name)
        if self._chosen is not None:
            self.count = len(self._chosen)

    def batch(self, positions: Int[np.ndarray, " batch"]) -> Batch:
        """The examples at `positions` among those that are to be seen, in that order."""
        ids = positions if self._chosen is None else self._chosen[positions]
        parts = [torch.from_numpy(part.astype(np.int64)) for part in (self._inputs[ids], self._targets[ids], ids)]
        if self._device.startswith("cuda"):
            parts = [part.pin_memory() for part in parts]
        return Batch(*parts).to(self._device)

    def positions(self, without: Int[Tensor, " ids"] | None = None) -> Int[np.ndarray, " positions"]:
        """Where the examples are whose ids are not in `without`."""
        ids = np.arange(self.count) if self._chosen is None else self._chosen
        left_out = [] if without is None else without.cpu().numpy()
        return np.flatnonzero(~np.isin(ids, left_out))

    def labelled(self, positions: Int[np.ndarray, " batch"], kinds: tuple[str, ...]) -> LabelledBatch:
        """The same with what is known of them."""
        batch = self.batch(positions)
        assert self._labels is not None, "a split without planted noise has no labels"
        labels = torch.from_numpy(self._labels[batch.ids.cpu().numpy()])
        return LabelledBatch(batch, labels, kinds)


def _checked(examples: Examples, count: int, context: int, split: str) -> Int[np.ndarray, " examples"]:
    """The examples' ids. Raises CorpusError for ids of other windows than a split of `count` has."""
    if examples.context not in (None, context):
        raise CorpusError(
            f"the examples of {split} were chosen among windows of {examples.context} tokens, but the model's context "
            f"is {context}; score it at this context"
        )
    if (unknown := examples.ids[examples.ids >= count]).size:
        raise CorpusError(f"the {split} split has {count} examples, so there is no example_id {unknown[0]}")
    if not len(examples.ids):
        raise CorpusError(f"no example of {split} is left to learn from")
    return examples.ids


class Loader:
    """Endless shuffled batches of a split; each epoch sees every example once, in an order of its own.

    `batch_size` counts the examples of the global batch, of which rank r of n takes the r-th of n equal
    slices. A batch may run over the end of an epoch, even of several. The state is the number of examples
    consumed by all ranks together, so it can be resumed with another batch size or number of ranks. Loaders
    of one split with different `order` are shuffled independently. Examples whose ids are in `without` are left out.
    """

    def __init__(
        self,
        split: Split,
        *,
        context: int,
        batch_size: int,
        streams: Streams,
        rank: int = 0,
        world_size: int = 1,
        device: str = "cpu",
        order: str | int = 0,
        without: Int[Tensor, " ids"] | None = None,
    ) -> None:
        _check_batch_size(batch_size)
        if batch_size % world_size:
            raise RecipeError(
                f"the batch of {batch_size} examples cannot be shared equally by {world_size} processes; "
                f"make it a multiple of {world_size}"
            )
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self._windows = Windows(split, context, device)
        self._positions = self._windows.positions(without)
        if not len(self._positions):
            raise CorpusError(f"no example of the {split.name} split is left beside those that are kept apart")
        self._streams, self._names = streams, (split.name, order)
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._position = 0
        self._shuffled: tuple[int, Int[np.ndarray, " examples"]] | None = None

    @property
    def examples_per_epoch(self) -> int:
        return len(self._positions)

    @property
    def epoch(self) -> int:
        """How many times every example has been seen."""
        return self._position // self.examples_per_epoch

    def next_batch(self) -> Batch:
        """This rank's part of the next global batch."""
        share = self._batch_size // self._world_size
        start = self._position + self._rank * share
        self._position += self._batch_size
        return self._windows.batch(self._ids(start, start + share))

    def state(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state(self, tree: dict[str, Any]) -> None:
        self._position = int(tree["position"])

    def _ids(self, start: int, stop: int) -> Int[np.ndarray, " batch"]:
        size = self.examples_per_epoch
        epochs = range(start // size, (stop - 1) // size + 1)
        return np.concatenate(
            [self._order(epoch)[max(start - epoch * size, 0) : stop - epoch * size] for epoch in epochs]
        )

    def _order(self, epoch: int) -> Int[np.ndarray, " examples"]:
        if self._shuffled is None or self._shuffled[0] != epoch:
            rng = np.random.default_rng(self._streams.derive("data", *self._names, epoch))
            self._shuffled = epoch, self._positions[rng.permutation(self.examples_per_epoch)]
        return self._shuffled[1]


class EvaluationBatches(Sequence[Batch]):
    """A fixed list of batches, made when they are asked for; each pass over it gives the same ones."""

    def __init__(self, windows: Windows, ids: Sequence[Int[np.ndarray, " _"]]) -> None:
        self._windows = windows
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> "EvaluationBatches": ...
    def __getitem__(self, index: int | slice) -> "Batch | EvaluationBatches":
        if isinstance(index, slice):
            return EvaluationBatches(self._windows, self._ids[index])
        return self._windows.batch(self._ids[index])


def evaluation_batches(
    split: Split,
    *,
    context: int,
    batch_size: int,
    max_batches: int | None,
    streams: Streams,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
) -> EvaluationBatches:
    """The batches on which every rule is measured at a given seed.

    All windows in order (the last batch may be smaller) if `max_batches` is None or leaves none out, else a
    fixed random choice of `max_batches · batch_size` of them. Rank r takes every `world_size`-th batch from
    the r-th on, so ranks may have unequal numbers, even none. Raises CorpusError if the split is too short.
    """
    _check_batch_size(batch_size)
    if max_batches is not None and max_batches < 1:
        raise RecipeError(f"cannot evaluate on {max_batches} batches; expected at least 1, or none for all")
    windows = Windows(split, context, device)
    ids = np.arange(windows.count)
    if max_batches is not None and max_batches * batch_size < windows.count:
        rng = np.random.default_rng(streams.derive("eval", split.name, "windows"))
        ids = np.sort(rng.permutation(windows.count)[: max_batches * batch_size])
    batches = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    return EvaluationBatches(windows, batches[rank::world_size])


def labelled_batches(
    split: Split, kinds: tuple[str, ...], context: int, batch_size: int, device: str = "cpu", most: int = 4096
) -> list[LabelledBatch]:
    """All examples of a split with planted noise, in order, or the first `most`."""
    windows = Windows(split, context, device)
    ids = np.arange(min(windows.count, most))
    starts = range(0, len(ids), batch_size)
    return [windows.labelled(ids[start : start + batch_size], kinds) for start in starts]


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise RecipeError(f"the batch size is {batch_size}, expected at least 1 example")
