"""The nudged phases of equilibrium propagation.

    dz/dt = F(z) ∓ β·∂L/∂z − (J − Jᵀ)(z − z*)

Near z* this is Jᵀ(z − z*) ∓ β·∂L/∂z, so that (z₋ − z₊)/2β comes to rest at the adjoint. Without the correction it is
J(z − z*) ∓ β·∂L/∂z, which has the adjoint's place only where J is symmetric.

A centred pair is kept as its mean and half of its difference: z± = mean ± half. The correction acts on the half
difference alone, for which it takes a single product with J and Jᵀ. Of the mean, which the nudges move by β² only, it
would change the estimate by no more than the order of its error; and what drift is left of the free phase can go on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.model.dynamics import Dynamics, Linearisation, Relaxed, Solver, per_example, relax

Gradient = Callable[[Tensor], Tensor]


BetaUnit = Literal["state", "gradient"]


def strength(
    beta: float,
    unit: BetaUnit,
    state: Float[Tensor, "batch time width"],
    nudge: Float[Tensor, "batch time width"],
) -> Float[Tensor, "batch 1 1"]:
    """What to multiply each example's ∂L/∂z with.

    In units of the state, no position is pushed by more than β times its own length. A nudge of fixed strength grows
    against a state that shrinks in training, as embeddings below a norm do: twice, as ∂L/∂z grows, too.
    """
    if unit == "gradient":
        return torch.full_like(state[:, :1, :1], beta)
    ratio = (nudge.norm(dim=-1) / state.norm(dim=-1)).amax(1)[:, None, None]
    return beta / torch.where(ratio > 0, ratio, 1.0)


@dataclass(frozen=True)
class NudgedPhase:
    """How to relax under a nudge of strength `beta`, one for each example."""

    beta: Float[Tensor, "batch 1 1"]
    steps: int
    step_size: float
    centered: bool = True
    corrected: bool = True
    clip: float | None = None
    solver: Solver = "damped"
    tolerance: float | None = None

    def adjoint(
        self, dynamics: Dynamics, linear: Linearisation, gradient: Gradient
    ) -> tuple[Float[Tensor, "layers batch time width"], Relaxed]:
        """(z₋ − z₊)/2β, or (z* − z₊)/β one-sided. `gradient` is ∂L/∂z of the last layer, at any state of it."""
        step = self._pair(dynamics, linear, gradient) if self.centered else self._single(dynamics, linear, gradient)
        rest = linear.z.detach()
        start = torch.stack([rest, torch.zeros_like(rest)]) if self.centered else torch.zeros_like(rest)[None]
        with torch.no_grad():
            relaxed = relax(
                step,
                start,
                steps=self.steps,
                solver=self.solver,
                tolerance=self.tolerance,
                dot=lambda a, b: per_example(a[-1], b[-1]),
            )
            return relaxed.state[-1] / -self.beta, relaxed

    def _pair(self, dynamics: Dynamics, linear: Linearisation, gradient: Gradient) -> Callable[[Tensor], Tensor]:
        def step(state: Tensor) -> Tensor:
            mean, half = state.unbind(0)
            up, down = mean + half, mean - half
            force_up, force_down = dynamics.force(up), dynamics.force(down)
            drift, pull = (force_up + force_down) / 2, (force_up - force_down) / 2
            slope_up, slope_down = gradient(up[-1]), gradient(down[-1])
            pull[-1].sub_((slope_up + slope_down) * (self.beta / 2))
            drift[-1].sub_((slope_up - slope_down) * (self.beta / 2))
            pull = self._correct(pull, half, linear)
            return torch.add(state, torch.stack([drift, pull]), alpha=self.step_size)

        return step

    def _single(self, dynamics: Dynamics, linear: Linearisation, gradient: Gradient) -> Callable[[Tensor], Tensor]:
        rest = linear.z.detach()

        def step(state: Tensor) -> Tensor:
            moved = rest + state[0]
            pull = dynamics.force(moved)
            pull[-1].sub_(gradient(moved[-1]) * self.beta)
            pull = self._correct(pull, state[0], linear)
            return torch.add(state, pull, alpha=self.step_size)

        return step

    def _correct(self, pull: Tensor, displacement: Tensor, linear: Linearisation) -> Tensor:
        """`pull` − (J − Jᵀ)·displacement; the latter at most `clip` times as long as the former in each example."""
        if not self.corrected:
            return pull
        correction = linear.jvp(displacement) - linear.vjp(displacement)
        if self.clip is not None:
            longest = self.clip * per_example(pull, pull).sqrt()
            length = per_example(correction, correction).sqrt()
            correction = correction * (longest / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp(max=1)
        return pull - correction
