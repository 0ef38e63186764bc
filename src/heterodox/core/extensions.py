"""What a part may offer beyond the contract of its slot; who offers it is asked."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from heterodox.core.protocols import LanguageModel, Objective, Update
from heterodox.core.types import Batch, Cost, Diagnosis, UpdateReport


@runtime_checkable
class Selecting(Protocol):
    """A rating that drops examples before anything is learned from them."""

    def kept(self, num_drawn: int) -> int:
        """How many of so many examples are kept."""
        ...

    def select(self, batch: Batch) -> Batch:
        """This rank's share of what is kept of the larger global batch of which `batch` is this rank's share."""
        ...


@runtime_checkable
class Costly(Protocol):
    """A rating that is not free."""

    def cost(self, batch: Batch) -> Cost:
        """What rating `batch`, this rank's share as drawn, costs this rank, and what it still owes from before."""
        ...


@runtime_checkable
class Uneven(Protocol):
    """A credit rule whose steps do not all cost the same."""

    def step_flops(self, model: LanguageModel, batch: Batch, step: int) -> int:
        """FLOPs of the signal of step number `step`, counted from 0, on a batch of this shape."""
        ...


@runtime_checkable
class Preparing(Protocol):
    """A rating that does something of its own before the first step, which `Costly.cost` then charges."""

    def prepare(self) -> bool:
        """Do a piece of it; return whether there is more to come."""
        ...

    @property
    def prepared_whole(self) -> bool:
        """Whether this is a good moment for a checkpoint of what is prepared so far."""
        ...

    def upfront(self) -> Cost:
        """What is yet to be done costs this rank; works on fake tensors."""
        ...

    def held_bytes(self, batch: Batch) -> int:
        """The most bytes that it will hold for a backward half, if it has one; `batch` is of the run's own steps."""
        ...

    def diagnose(self) -> Diagnosis:
        """What went wrong in it; told once."""
        ...


@runtime_checkable
class Remarking(Protocol):
    """A credit rule with more to declare than an origin for each parameter."""

    def remarks(self) -> list[str]:
        """Sentences for the manifest; none if there is nothing to say."""
        ...


@runtime_checkable
class ForgetfulUpdate(Update, Protocol):
    """An update that can be told that some entries of a parameter begin anew."""

    def forget(self, name: str, entries: Bool[Tensor, "*shape"]) -> None:
        """Drop what is remembered of these entries: they are as if they had never had a gradient."""
        ...


@runtime_checkable
class Window(Protocol):
    """A look at the model with other weights, on batches of one's own. It leaves no trace in model, rule or RNG.

    `weights` replaces parameters by name; those that it lacks are as they are. Dropout is off. Losses and signals are
    means over the ranks, for plain cross-entropy. `cost` is what has been consumed since it was last set to `Cost()`.
    """

    cost: Cost

    def losses(self, batch: Batch, weights: Mapping[str, Tensor]) -> Float[Tensor, " examples"]:
        """Cross-entropy in nats per token of each example, those of all ranks."""
        ...

    def signal(self, batch: Batch, weights: Mapping[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Cross-entropy, and the credit rule's signal by parameter name."""
        ...


@runtime_checkable
class StructuralUpdate(Update, Protocol):
    """An update that decides which weights there are, not only how they move.

    `search_seconds` is what changing the structure has taken so far; while `still`, it does not change.
    """

    search_seconds: float
    still: bool

    @property
    def structured(self) -> Sequence[str]:
        """The parameters whose structure it decides."""
        ...

    def watch(self, window: Window) -> None:
        """Be handed the window to look through; called once, after `connect`."""
        ...

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Bring freshly drawn weights into the structure; not called when a run is resumed."""
        ...

    def select(self, grads: Mapping[str, Tensor]) -> None:
        """See the mean signal before it is clipped, and zero in place what must not move."""
        ...

    def clipped(self, factor: Float[Tensor, ""]) -> None:
        """Be told what the clip multiplied that signal by."""
        ...

    def rehearse(self) -> int:
        """Take the state that it has after the first change of structure; works on fake tensors.

        Returns the bytes that it holds besides its state.
        """
        ...

    def changes(self, step: int) -> bool:
        """Whether the structure may change in step number `step`, counted from 0."""
        ...

    @property
    def passes(self) -> Sequence[tuple[int, bool]]:
        """What it passes through the window then: so many examples, and whether it asks for their signal."""
        ...

    def report(self) -> UpdateReport:
        """What the last `apply` consumed and did besides moving weights; asked for once a step."""
        ...

    @property
    def num_masked(self) -> int:
        """Weights that are held at zero."""
        ...

    @property
    def saw_dense(self) -> bool:
        """Whether the last `select` needed the signal of masked weights, too."""
        ...


@runtime_checkable
class PerToken(Objective, Protocol):
    """An objective that is a mean over positions, and can tell them apart."""

    def token_losses(self, logits: Float[Tensor, "batch time vocab"], batch: Batch) -> Float[Tensor, "batch time"]:
        """The objective of each position; their mean over an example is its `losses`."""
        ...


@runtime_checkable
class EvolvingObjective(Objective, Protocol):
    """An objective that changes as the model learns."""

    def begin(self) -> None:
        """Take the model as it is before the first step; not called when a run is resumed."""
        ...

    def cost(self, batch: Batch) -> Cost:
        """What its `losses` consume for a batch, beyond the model's own logits."""
        ...

    def step_cost(self, batch: Batch, step: int) -> Cost:
        """The same of step number `step`, counted from 0; works on fake tensors."""
        ...

    def advance(self) -> dict[str, Tensor]:
        """Follow the model after a step; what there is to log of the step."""
        ...
