"""What a run offers to the parts that need more than their recipe section."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from heterodox.core.comm import Comm
from heterodox.core.protocols import LanguageModel
from heterodox.core.rng import Streams
from heterodox.core.state import Stateful, Tree
from heterodox.core.types import Batch

LearnableSplit = Literal["train", "meta"]
"""The splits that rules may look at; never `val` or `test`."""


@runtime_checkable
class Batches(Stateful, Protocol):
    """Endless batches: what `next_batch` gives is this rank's share of the next global batch."""

    @property
    def examples_per_epoch(self) -> int:
        """How many different examples there are."""
        ...

    def next_batch(self) -> Batch: ...


@runtime_checkable
class Supply(Protocol):
    """Opens batches of a part's own.

    `batch_size` counts the examples of the global batch; with `whole`, each rank gets all of it. Batches of one split
    with different `order` are shuffled independently of each other and of what the run trains on; the examples whose
    ids are in `without` are left out. Who opens them keeps their state with its own.
    """

    def __call__(
        self,
        split: LearnableSplit,
        batch_size: int,
        order: str | int = 0,
        *,
        whole: bool = False,
        without: Int[Tensor, " ids"] | None = None,
    ) -> Batches: ...


def no_supply(
    split: LearnableSplit,
    batch_size: int,
    order: str | int = 0,
    *,
    whole: bool = False,
    without: Int[Tensor, " ids"] | None = None,
) -> Batches:
    """Where there is no corpus, as for a part that is used alone."""
    raise LookupError(f"this part wants batches of the {split} split; hand it services with a supply")


@dataclass(frozen=True)
class SavedRun:
    """Another run, as a part may look at it: its resolved recipe, what its learner remembers, its tokenizer."""

    recipe: dict[str, Any]
    learner: Tree
    tokenizer_sha256: str


def no_runs(path: Path) -> SavedRun:
    """Where nothing can be opened, as for a part that is used alone."""
    raise LookupError(f"this part wants the run in {path}; hand it services with open_run")


@dataclass(frozen=True)
class Services:
    """The model, the named random streams, the other ranks, and batches of one's own; `steps` the run will last.

    `steps` is None where the budget does not say. `open_run` reads another run's folder, and `tokenizer_sha256` is the
    fingerprint of this one's tokenizer, None without a corpus. A part that reads something from outside of the run
    notes a hash of it in `inputs`, under the recipe's key: the run is only resumed with the same.
    """

    model: LanguageModel
    streams: Streams
    comm: Comm
    supply: Supply = no_supply
    steps: int | None = None
    open_run: Callable[[Path], SavedRun] = no_runs
    tokenizer_sha256: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)


@runtime_checkable
class Connected(Protocol):
    """A part that uses the services of its run. Called once, before anything else but the constructor."""

    def connect(self, services: Services) -> None: ...
