"""What a run offers to the parts that need more than their recipe section."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from heterodox.core.comm import Comm
from heterodox.core.protocols import LanguageModel
from heterodox.core.rng import Streams
from heterodox.core.state import Stateful
from heterodox.core.types import Batch

LearnableSplit = Literal["train", "meta"]
"""The splits that rules may look at; never `val` or `test`."""


@runtime_checkable
class Batches(Stateful, Protocol):
    """Endless batches: what `next_batch` gives is this rank's share of the next global batch."""

    def next_batch(self) -> Batch: ...


@runtime_checkable
class Supply(Protocol):
    """Opens batches of a part's own.

    `batch_size` counts the examples of the global batch. Batches of one split with different `order` are shuffled
    independently of each other and of what the run trains on. Who opens them keeps their state with its own.
    """

    def __call__(self, split: LearnableSplit, batch_size: int, order: str | int = 0) -> Batches: ...


def no_supply(split: LearnableSplit, batch_size: int, order: str | int = 0) -> Batches:
    """Where there is no corpus, as for a part that is used alone."""
    raise LookupError(f"this part wants batches of the {split} split; hand it services with a supply")


@dataclass(frozen=True)
class Services:
    """The model, the named random streams, the other ranks, and batches of one's own; `steps` the run will last.

    `steps` is None where the budget does not say.
    """

    model: LanguageModel
    streams: Streams
    comm: Comm
    supply: Supply = no_supply
    steps: int | None = None


@runtime_checkable
class Connected(Protocol):
    """A part that uses the services of its run. Called once, before anything else but the constructor."""

    def connect(self, services: Services) -> None: ...
