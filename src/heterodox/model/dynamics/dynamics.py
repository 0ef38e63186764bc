"""A network as a dynamical system.

    dz/dt = F(z) = G(z) − d·z

z stacks the states of all layers, d > 0 is the decay, and G is what drives the state: the blocks, the clamped input
and whatever one layer passes on to the next. −d·z comes from an energy; G in general does not, because its Jacobian
is not symmetric.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heterodox.model.dynamics.solver import Relaxed


@dataclass(frozen=True)
class Matmuls:
    """FLOPs of one evaluation's matrix products: with weights, and those of attention."""

    linear: int
    attention: int
    entering: int = 0
    """The part of `linear` whose input is the state itself, with no parameter before it."""
    leaving: int = 0
    """The part of `linear` whose output is added to the force."""


class Dynamics(ABC):
    """dz/dt = G(z) − d·z on one batch of tokens."""

    decay: float
    step_size: float
    """ε of the Euler steps that suit this system."""
    nudged_steps: int
    """Euler steps after which a nudge at the output has reached every layer."""
    acyclic: bool = False
    """Whether no state acts back on itself: then a nudge has settled for good after `nudged_steps`."""
    flops: Matmuls
    """FLOPs of one evaluation of G."""

    @abstractmethod
    def drive(self, z: Float[Tensor, "layers batch time width"]) -> Float[Tensor, "layers batch time width"]:
        """G(z)."""

    @abstractmethod
    def settle(self) -> Relaxed:
        """The free phase: from its starting point to the fixed point. Differentiable where gradients are on."""

    def force(self, z: Float[Tensor, "layers batch time width"]) -> Float[Tensor, "layers batch time width"]:
        """F(z)."""
        return torch.sub(self.drive(z), z, alpha=self.decay)


class Dynamical(Protocol):
    """A model that can be seen as a dynamical system."""

    def dynamics(self, tokens: Int[Tensor, "batch time"]) -> Dynamics: ...
