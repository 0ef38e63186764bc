"""The contracts between the rooms: what a model, an objective, a rating, a credit rule and an update must offer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heterodox.core.state import Stateful, Tree
from heterodox.core.types import Batch, Diagnosis, Origin, Signal


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
