"""What a topology is asked, what it sees, and what it answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heterodox.core.errors import RecipeError
from heterodox.core.extensions import Window
from heterodox.core.protocols import Stateless
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.core.state import Tree
from heterodox.update.sparse.ahead import Ahead
from heterodox.update.sparse.distribution import Distribution, distribute
from heterodox.update.sparse.masks import Masks
from heterodox.update.sparse.schedule import Schedule


@dataclass
class Sight:
    """What a topology sees when its mask may change, after the weights have moved.

    `weights` and `signal` are flat, over all entries of all masked matrices; the signal is the credit rule's, the mean
    over the ranks before the clip, and there only where the topology asks for it. `draw` gives new connections their
    first values, by their flat positions. `ahead` tells where the inner update would go.
    """

    step: int
    steps: int
    masks: Masks
    weights: Float[Tensor, " entries"]
    signal: Float[Tensor, " entries"] | None
    draw: Callable[[Int[Tensor, " n"], str], Tensor]
    ahead: Ahead
    window: Window | None
    streams: Streams

    @property
    def finite(self) -> bool:
        """Whether weights and signal are numbers, which alone have an order."""
        seen = [self.weights] if self.signal is None else [self.weights, self.signal]
        return all(bool(tensor.isfinite().all()) for tensor in seen)

    def generator(self, *names: str | int) -> torch.Generator:
        """Random numbers for this event alone, the same on every rank."""
        return self.streams.generator("rule", "topology", self.step, *names)

    def random(self, *names: str | int) -> Float[Tensor, " entries"]:
        """A random number for every entry."""
        drawn = torch.rand(self.masks.size, generator=self.generator(*names))
        return drawn.to(self.weights.device)


@dataclass
class Change:
    """A new mask. Entries that it has and the old one lacks begin at `values`, in their flat order (default: drawn)."""

    flat: Bool[Tensor, " entries"]
    values: Float[Tensor, " grown"] | None = None
    told: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)


class Topology(Stateless, ABC):
    """How a mask begins and how it changes."""

    wants_signal = False
    schedule: Schedule | None = None

    def connect(self, services: Services, masks: Masks) -> None:
        """Be handed the run's services and the masks before they are drawn; by default nothing is kept."""
        return None

    def start(self, masks: Masks, sparsity: float, distribution: Distribution) -> list[int]:
        """Active connections of each layer at the beginning."""
        return distribute(masks.shapes, sparsity, distribution)

    @property
    def passes(self) -> list[tuple[int, bool]]:
        """What an event passes through the window: so many examples of this rank, and whether it asks for a signal."""
        return []

    @abstractmethod
    def change(self, sight: Sight) -> Change | None:
        """The next mask, or None to leave it as it is."""

    def metrics(self) -> dict[str, float]:
        """What there is to log of every step."""
        return {}

    def state(self) -> Tree:
        return {}


def swapped(flat: Bool[Tensor, " entries"], dropped: Int[Tensor, " n"], grown: Int[Tensor, " n"]) -> Tensor:
    """The mask with some connections dropped and as many grown."""
    new = flat.clone()
    new[dropped] = False
    new[grown] = True
    return new


def require_one(key: str, share: float, count: int, where: str) -> None:
    """Raise `RecipeError` where a share of so many connections is less than one."""
    if round(share * count) < 1:
        raise RecipeError(
            f"update.topology.{key} {share} of {count} connections {where} is less than one swap; "
            f"make it at least {1 / count:.2g}"
        )
