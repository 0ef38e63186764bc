"""The contracts between the rooms: what a model, an objective, a rating, a credit rule and an update must offer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heterodox.core.state import Stateful, Tree
from heterodox.core.types import Batch, Cost, Diagnosis, LabelledBatch, Origin, Signal, StepReport, UpdateReport


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass, by where they go; a multiply–add is two. Elementwise work is not counted.

    `fixed` goes into matrices that never learn but pass errors on, `lookup` into products that no error goes through.
    """

    linear: int
    attention: int
    head: int
    fixed: int = 0
    lookup: int = 0

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.head + self.fixed + self.lookup

    @property
    def input_gradients(self) -> int:
        """FLOPs of a backward pass through everything, but for the gradients of the weights."""
        return self.linear + 2 * self.attention + self.head + self.fixed

    @property
    def with_backward(self) -> int:
        """FLOPs of a forward pass and a backward pass that yields the gradient of every weight."""
        return self.total + self.input_gradients + self.linear + self.head


class LanguageModel(nn.Module, ABC):
    """A next-token model that is `head(ln_f(features(tokens)))`: a residual stream, a final norm, an output layer.

    Its embeddings are called `tok_emb` and `pos_emb`.
    """

    tok_emb: nn.Embedding
    pos_emb: nn.Embedding
    ln_f: nn.Module
    head: nn.Linear
    context: int
    autocast_dtype: torch.dtype | None = None

    @abstractmethod
    def features(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        """The hidden states before the final normalisation."""

    def readout(self, hidden: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time vocab"]:
        """Logits from hidden states: final normalisation and `head`."""
        with self.autocast():
            return self.head(self.ln_f(hidden))

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Compute without autocast: for small differences and double derivatives, which drown in bfloat16."""
        dtype, self.autocast_dtype = self.autocast_dtype, None
        try:
            yield
        finally:
            self.autocast_dtype = dtype

    def autocast(self) -> torch.autocast:
        """The context that `features` and `readout` compute in; off without an `autocast_dtype`."""
        device = self.head.weight.device.type
        return torch.autocast(device, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    @property
    @abstractmethod
    def stream_writers(self) -> frozenset[str]:
        """Names of the layers whose output is added to the residual stream, embeddings among them."""

    @abstractmethod
    def forward_flops(self, batch: int, time: int) -> ForwardFlops:
        """FLOPs of one forward pass over `batch` windows of `time` tokens."""

    @property
    def readout_names(self) -> frozenset[str]:
        """Names of the parameters that `readout` uses."""
        return frozenset(name for name, _ in self.named_parameters() if name.startswith(("ln_f.", "head.")))

    @property
    def embedding_names(self) -> frozenset[str]:
        """Names of the parameters of token and position embeddings."""
        return frozenset({"tok_emb.weight", "pos_emb.weight"})

    def diagnose(self, tokens: Int[Tensor, "batch time"]) -> Diagnosis:
        """What is to be known of the model's health on `tokens`, beyond its loss; nothing by default."""
        return Diagnosis()

    def compile(self, **options: Any) -> None:
        """Compile both halves with `torch.compile`, for rules that call them apart, too."""
        self.features = torch.compile(self.features, **options)
        self.readout = torch.compile(self.readout, **options)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        return self.readout(self.features(tokens))


@runtime_checkable
class Objective(Stateful, Protocol):
    """What is wanted."""

    def losses(self, logits: Float[Tensor, "batch time vocab"], batch: Batch) -> Float[Tensor, " batch"]:
        """The objective of each example, in nats per token; differentiable in `logits`."""
        ...


@runtime_checkable
class Rating(Stateful, Protocol):
    """Which examples count."""

    def weights(self, batch: Batch) -> Float[Tensor, " batch"]:
        """One weight per example; their mean over the *global* batch is 1."""
        ...


@runtime_checkable
class Credit(Stateful, Protocol):
    """Which parameter is to blame."""

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        """What each parameter should move against, for the mean of `weights * losses` over the batch."""
        ...

    def manifest(self, model: LanguageModel) -> Mapping[str, Origin]:
        """For every parameter of `model`, where its signal comes from."""
        ...


@runtime_checkable
class Update(Stateful, Protocol):
    """How the weights move."""

    lr: float

    def apply(self, parameters: Mapping[str, nn.Parameter], grads: Mapping[str, Tensor], scale: float) -> None:
        """Move in place each parameter that `grads` names; `scale` multiplies the learning rate."""
        ...


class Stateless:
    """For parts that remember nothing between two steps."""

    def state(self) -> Tree:
        return {}

    def load_state(self, tree: Tree) -> None:
        assert not tree, f"{type(self).__name__} keeps no state, but was handed {sorted(tree)}"


# What a part may offer beyond the contract of its slot; who offers it is asked.


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


# What the trainer asks of a learner.


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
