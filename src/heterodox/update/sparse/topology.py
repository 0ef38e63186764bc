"""What a topology is asked, what it sees, and what it answers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from heterodox.core import slot as config
from heterodox.core.errors import RecipeError
from heterodox.core.protocols import ForgetfulUpdate, Stateless, Window
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.core.state import Tree, map_tensors
from heterodox.update.sparse.masks import Distribution, Masks, distribute

# When masks change, and by how much: schedules as data.


Decay = Literal["cosine", "constant"]


class Schedule(config.Config):
    """An event every so many steps, from one step of the run to a share of it."""

    every: int = Field(100, ge=1, description="steps between two changes of the mask")
    start: int = Field(0, ge=0, description="no change before this step")
    until: float = Field(0.75, gt=0, le=1, description="no change after this share of the run's steps")

    def last(self, steps: int) -> int:
        """The last step that may change the mask in a run of so many."""
        return math.floor(self.until * steps)

    def num_events(self, steps: int) -> int:
        """How many events a run of so many steps has."""
        return self.last(steps) // self.every - max(self.start - 1, 0) // self.every

    def due(self, step: int, steps: int) -> bool:
        """Whether the mask changes after this step."""
        return step % self.every == 0 and self.start <= step <= self.last(steps)

    def progress(self, step: int, steps: int) -> float:
        """The share of the time for changes that has passed, from 0 at `start` to 1 at the last step."""
        span = self.last(steps) - self.start
        return min(max((step - self.start) / span, 0.0), 1.0) if span > 0 else 1.0

    def refusals(self, recipe: config.Config) -> list[str]:
        budget = recipe.run.budget  # pyrefly: ignore[missing-attribute]
        if budget.steps is None:
            return [f"update.topology needs a run.budget in steps, to know when to stop; found one in {budget.unit}"]
        if self.num_events(budget.steps) < 1:
            return [
                f"update.topology.every is {self.every}, but the mask may change only from step {self.start} to "
                f"{self.last(budget.steps)} of {budget.steps}: it never would; lower it"
            ]
        return []


class DecayingSchedule(Schedule):
    """Events that change less and less; one in which nothing is left to change is none."""

    decay: Decay = Field("cosine", description="of the share that an event changes, over the time for changes")

    def num_events(self, steps: int) -> int:
        return super().num_events(steps) - self._idle(self.last(steps), steps)

    def due(self, step: int, steps: int) -> bool:
        return super().due(step, steps) and not self._idle(step, steps)

    def _idle(self, step: int, steps: int) -> bool:
        return self.decay == "cosine" and super().due(step, steps) and self.progress(step, steps) == 1.0

    def decayed(self, share: float, step: int, steps: int) -> float:
        """What is left of a `share` at this step."""
        return share * (cosine(self.progress(step, steps)) if self.decay == "cosine" else 1.0)


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def cubic(progress: float) -> float:
    """From 0 to 1, fast at first: 1 − (1 − progress)³."""
    return 1 - (1 - progress) ** 3


# Where the inner update would go next, without going there.


@dataclass(frozen=True)
class Ahead:
    """The inner update's steps from here, at this event's learning rate and clip (a factor on the signal)."""

    make_around: Callable[[], ForgetfulUpdate]
    around: ForgetfulUpdate
    parameters: Mapping[str, nn.Parameter]
    masks: Masks
    scale: float
    clip: Tensor | float = 1.0

    def newborn(self, values: Float[Tensor, " n"], signal: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Connections of these values after their first step by `signal`."""
        new = nn.Parameter(values.clone()[None])
        self.make_around().apply({"new": new}, {"new": self.clip * signal[None]}, self.scale)
        return new.data[0]

    def present(self, signal: Float[Tensor, " entries"]) -> Float[Tensor, " entries"]:
        """All entries after the connections that there are have taken another step by `signal`."""
        twin = self.make_around()
        twin.load_state(map_tensors(self.around.state(), torch.clone))
        copies = {name: nn.Parameter(self.parameters[name].detach().clone()) for name in self.masks.names}
        clipped = self.clip * signal * self.masks.flat
        grads = {name: grad.clone() for name, grad in self.masks.split(clipped).items()}
        twin.apply(copies, grads, self.scale)
        return self.masks.join(copies)


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
