"""What the trainer asks of a learner."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from heterodox.core.protocols import LanguageModel
from heterodox.core.state import Stateful
from heterodox.core.types import Batch, Cost, Diagnosis, LabelledBatch, Origin, StepReport


@dataclass(frozen=True)
class Foretold:
    """What a step will cost, bytes by what they are for, how many parameters learn, and what is paid once, at first.

    Where steps differ, `later` gives the cost of any one of them by its number, counted from 0.
    """

    cost: Cost
    memory_bytes: dict[str, int]
    trained_parameters: int
    once: Cost = field(default_factory=Cost)
    later: Callable[[int], Cost] | None = None

    def of(self, step: int) -> Cost:
        """The cost of step number `step`."""
        return self.cost if self.later is None else self.later(step)


@runtime_checkable
class Learner(Stateful, Protocol):
    """What one step is. All methods are called by all ranks alike, so that they may talk to each other."""

    model: LanguageModel
    """The model that is evaluated, kept and described by the manifest."""

    @property
    def lr(self) -> float:
        """The learning rate that the run's schedule scales."""
        ...

    def begin(self) -> None:
        """Bring freshly drawn weights to where learning starts from; what is resumed is overwritten later."""
        ...

    def prepare(self) -> bool:
        """Do a piece of what comes before the first step, so short that a signal may wait for it.

        Returns whether there is more.
        """
        ...

    @property
    def prepared_whole(self) -> bool:
        """Whether this is a good moment for a checkpoint of what is prepared so far."""
        ...

    def step(
        self, batch: Batch, *, lr_scale: float = 1.0, probe: bool = False, dropout_seed: int | None = None
    ) -> StepReport:
        """Learn from `batch`, this rank's share of the global batch."""
        ...

    def settle(self) -> None:
        """Bring `model` up to date; called before it is looked at."""
        ...

    def manifest(self) -> Mapping[str, Origin]:
        """For every parameter of `model`, where its signal comes from."""
        ...

    def remarks(self) -> list[str]:
        """What else there is to declare; none if there is nothing to say."""
        ...

    @property
    def num_masked(self) -> int:
        """Weights that are held at zero."""
        ...

    @property
    def search_seconds(self) -> float:
        """What changing the structure of the weights has taken, of the seconds of training."""
        ...

    def held_bytes(self, batch: Batch) -> int:
        """The most bytes held for a backward half, in a step or before the first; leaves the learner as it was."""
        ...

    def foretell(self, batch: Batch) -> Foretold:
        """What steps on such batches cost. May change the learner, and works on fake tensors."""
        ...

    def examine(self, examples: Sequence[LabelledBatch]) -> Diagnosis:
        """What is to be known of more than the model's loss, on held-out examples whose kind is known, if there are."""
        ...


@runtime_checkable
class Scoring(Protocol):
    """A learner with an opinion on examples."""

    def scores(self, batch: Batch) -> Float[Tensor, " batch"]:
        """One number per example, higher for better."""
        ...
