"""The steps of an optimizer, forwards and backwards.

A state is (w, m, v, …): weights and moments, each as one flat vector. Forwards, `take` maps the state before a step and
the gradient g to the state behind it; backwards, `pull` maps the adjoint λ = ∂L/∂(state behind) to ∂L/∂(state before)
with g held fixed, and to λ_g = ∂L/∂g. How g depends on w is the caller's business: one Hessian-vector product.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Flat = Float[Tensor, " parameters"]


@dataclass(frozen=True)
class InnerState:
    """Weights and moments between two steps, and how many steps there were. Never changed in place."""

    weights: Flat
    moments: tuple[Flat, ...]
    step: int = 0


@dataclass(frozen=True)
class Adjoint:
    """The derivative of the final loss in each part of a state."""

    weights: Flat
    moments: tuple[Flat, ...]


@runtime_checkable
class InnerUpdate(Protocol):
    """An optimizer whose steps can be reversed."""

    def begin(self, weights: Flat) -> InnerState:
        """The state before the first step."""
        ...

    def take(self, state: InnerState, gradient: Flat) -> InnerState:
        """The state behind a step."""
        ...

    def pull(self, state: InnerState, gradient: Flat, adjoint: Adjoint) -> tuple[Adjoint, Flat]:
        """From the adjoint behind the step: the adjoint before it, and that of the gradient."""
        ...


@dataclass(frozen=True)
class InnerAdamW:
    """AdamW as `torch.optim.AdamW` has it, but for `eps_root`.

        m' = β₁ m + (1−β₁) g,  v' = β₂ v + (1−β₂) g²,  D = √(v'/c₂ + ε_root) + ε,  w' = (1 − ηλ) w − (η/c₁) m'/D

    with c = 1 − β^t. At v = 0 the root has no derivative: `eps_root` above 0 gives it one (0 takes it for 0 there).
    `weight_decay` is a number or one for each weight; `warmup` steps raise the learning rate linearly from the first.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 0.0
    weight_decay: float | Flat = 0.01
    warmup: int = 0

    def begin(self, weights: Flat) -> InnerState:
        return InnerState(weights, (torch.zeros_like(weights), torch.zeros_like(weights)))

    def take(self, state: InnerState, gradient: Flat) -> InnerState:
        first, second = self._moments(state, gradient)
        rate, _, root = self._scale(state.step, second)
        weights = state.weights * (1 - self._rate(state.step) * self.weight_decay)
        return InnerState(weights.addcdiv_(first, root.add_(self.eps), value=-rate), (first, second), state.step + 1)

    def pull(self, state: InnerState, gradient: Flat, adjoint: Adjoint) -> tuple[Adjoint, Flat]:
        first, second = self._moments(state, gradient)
        rate, correction, root = self._scale(state.step, second)
        pulled = adjoint.weights / (root + self.eps) * -rate  # ∂(−rate m'/D)/∂m', times λ_w
        to_first = adjoint.moments[0] + pulled
        slope = torch.where(root > 0, 0.5 / (correction * root * (root + self.eps)), 0.0)
        to_second = adjoint.moments[1] - pulled * first * slope
        to_gradient = (1 - self.betas[0]) * to_first + 2 * (1 - self.betas[1]) * gradient * to_second
        weights = adjoint.weights * (1 - self._rate(state.step) * self.weight_decay)
        return Adjoint(weights, (self.betas[0] * to_first, self.betas[1] * to_second)), to_gradient

    def _moments(self, state: InnerState, gradient: Flat) -> tuple[Flat, Flat]:
        first = torch.lerp(state.moments[0], gradient, 1 - self.betas[0])
        return first, (state.moments[1] * self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])

    def _scale(self, step: int, second: Flat) -> tuple[float, float, Flat]:
        """η/c₁, c₂ and √(v'/c₂ + ε_root)."""
        correction = 1 - self.betas[1] ** (step + 1)
        rate = self._rate(step) / (1 - self.betas[0] ** (step + 1))
        return rate, correction, (second / correction).add_(self.eps_root).sqrt_()

    def _rate(self, step: int) -> float:
        return self.lr * warm(step, self.warmup)


@dataclass(frozen=True)
class InnerSGD:
    """SGD with momentum as `torch.optim.SGD` has it: u' = μu + g + λw, w' = w − ηu' (nesterov: − η(g + λw + μu'))."""

    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float | Flat = 0.0
    warmup: int = 0

    def begin(self, weights: Flat) -> InnerState:
        return InnerState(weights, (torch.zeros_like(weights),) if self.momentum else ())

    def take(self, state: InnerState, gradient: Flat) -> InnerState:
        direction = gradient + self.weight_decay * state.weights
        rate = self.lr * warm(state.step, self.warmup)
        if not self.momentum:
            return InnerState(state.weights - rate * direction, (), state.step + 1)
        velocity = torch.add(direction, state.moments[0], alpha=self.momentum)
        ahead = torch.add(direction, velocity, alpha=self.momentum) if self.nesterov else velocity
        return InnerState(state.weights - rate * ahead, (velocity,), state.step + 1)

    def pull(self, state: InnerState, gradient: Flat, adjoint: Adjoint) -> tuple[Adjoint, Flat]:
        pulled = adjoint.weights * -(self.lr * warm(state.step, self.warmup))
        moments: tuple[Flat, ...] = ()
        to_gradient = pulled
        if self.momentum:
            to_velocity = adjoint.moments[0] + (self.momentum * pulled if self.nesterov else pulled)
            to_gradient = to_velocity + pulled if self.nesterov else to_velocity
            moments = (self.momentum * to_velocity,)
        return Adjoint(adjoint.weights + self.weight_decay * to_gradient, moments), to_gradient


def warm(step: int, warmup: int) -> float:
    """The factor on the learning rate of step number `step`, from 0."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def clip(gradient: Flat, limit: float | None) -> Flat:
    """g · min(1, limit / (‖g‖ + 1e-6)), as the trainer clips."""
    if limit is None:
        return gradient
    return gradient * torch.clamp(limit / (gradient.norm() + 1e-6), max=1.0)


def pull_clip(gradient: Flat, adjoint: Flat, limit: float | None) -> Flat:
    """The adjoint of g from that of `clip(g)`."""
    if limit is None:
        return adjoint
    norm = gradient.norm()
    factor = limit / (norm + 1e-6)
    radial = (gradient @ adjoint) * factor / ((norm + 1e-6) * norm.clamp_min(torch.finfo(norm.dtype).tiny))
    return torch.where(factor < 1, factor * adjoint - radial * gradient, adjoint)


# Why a meta-gradient is not finite.


CHAOTIC = (
    "the inner run is chaotic, its end depends on every step without bound. Lower its learning rate or warm it up, "
    "enlarge its batches, give it something to learn, or differentiate fewer steps"
)


def why_not_finite(
    val_loss: Float[Tensor, ""],
    losses: list[Tensor],
    adjoint_norms: Float[Tensor, " steps_and_end"],
    derivatives: list[Tensor],
) -> str | None:
    """One sentence, or None if all of the derivatives are finite; `adjoint_norms[k]` is k steps before the end."""
    if all(derivative.isfinite().all() for derivative in derivatives):
        return None
    found = "the meta-gradient is not finite: "
    for step, loss in enumerate(losses):
        if not loss.isfinite().all():
            return f"{found}a loss of inner step {step} is not; lower the inner learning rate, or clip its gradients"
    if not val_loss.isfinite():
        return f"{found}the validation loss is {float(val_loss)}; lower the inner learning rate, or clip its gradients"
    bad = (~adjoint_norms.isfinite()).nonzero()
    if not len(bad):
        return f"{found}losses and adjoints are; look for an infinite derivative in what computes the weights"
    back = int(bad[0])
    if not back:
        return f"{found}the validation loss is, but not its gradient in the model's weights"
    before = adjoint_norms[:back]
    kind = str(adjoint_norms.dtype).removeprefix("torch.")
    return (
        f"{found}the norm of the adjoint grew from {float(before[0]):.3g} to {float(before.max()):.3g} on the way back "
        f"and left {kind} {back} steps before the end, though every loss is finite: {CHAOTIC}"
    )
