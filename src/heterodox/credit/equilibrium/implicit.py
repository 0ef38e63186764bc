"""Implicit differentiation: the exact gradient at the fixed point, by solving its linear system."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor

from heterodox.core import slot as config
from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.rng import Streams
from heterodox.core.state import Tree
from heterodox.core.types import Batch, Cost, Origin, Signal
from heterodox.credit.equilibrium.shared import (
    drive_flops,
    dynamics_of,
    fixed_point_manifest,
    needs_equilibrium_model,
    plus,
    product_flops,
    read_out,
    reading_flops,
    relaxed_names,
    residual_limit,
    withhold_unsettled,
)
from heterodox.credit.feedback_alignment import JacobianPenalty, penalty_refusals
from heterodox.model.dynamics import Dynamics, Linearisation, Relaxed, Solver, relax, some_steps


class Implicit:
    """Implicit differentiation: the exact gradient at the fixed point, by solving its linear system.

        Jᵀ a = −∂L/∂z,    ∂L/∂θ = (∂F/∂θ)ᵀ a

    The system is solved by the steps a ← a + ε·(∂L/∂z + Jᵀ a), plain or with Anderson's acceleration, until each
    example's last step is within the tolerance. The memory does not grow with the number of free steps. It is the
    gradient that a relaxation of infinitely many steps would have; `bptt` differentiates the steps that were taken.
    References: Almeida, 1987, and Pineda, "Generalization of back-propagation to recurrent neural networks", Physical
    Review Letters 1987; Bai, Kolter and Koltun, "Deep equilibrium models", NeurIPS 2019.

    The free phase, one linear system, and what its solution says of every parameter.
    """

    class Config(config.Config):
        name: Literal["implicit"] = "implicit"
        steps: int = Field(50, ge=1, description="of the linear solver, at most")
        tolerance: float | None = Field(
            1e-5, gt=0, description="an example stops once it moves by less than this share of itself; null: never"
        )
        solver: Solver = "damped"
        residual_limit: float | None = Field(
            0.1, gt=0, description="relative last step of the free phase past which a run stops; null: never"
        )
        adjoint_limit: float | None = Field(
            0.1, gt=0, description="relative last step of the linear solver past which an example gets no credit"
        )
        jacobian_penalty: float = Field(0.0, ge=0, description="strength of the penalty on the Jacobian, γ")
        jacobian_powers: int = Field(4, ge=0, description="steps that turn its probe to the largest eigenvalues")

        _some_steps = field_validator("steps", mode="before")(some_steps)

        def refusals(self, recipe: config.Config) -> list[str]:
            return needs_equilibrium_model("implicit", recipe) + penalty_refusals(self)

        def build(self, model: LanguageModel, streams: Streams) -> "Implicit":
            return Implicit(
                JacobianPenalty(self.jacobian_penalty, streams, self.jacobian_powers),
                steps=self.steps,
                tolerance=self.tolerance,
                solver=self.solver,
                residual_limit=self.residual_limit,
                adjoint_limit=self.adjoint_limit,
            )

    def __init__(
        self,
        penalty: JacobianPenalty | None = None,
        *,
        steps: int = 50,
        tolerance: float | None = 1e-5,
        solver: Solver = "damped",
        residual_limit: float | None = 0.1,
        adjoint_limit: float | None = 0.1,
    ) -> None:
        self.penalty = penalty or JacobianPenalty(0.0, Streams(0))
        self.steps, self.tolerance, self.solver = steps, tolerance, solver
        self.residual_limit, self.adjoint_limit = residual_limit, adjoint_limit

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        dynamics = dynamics_of(model, batch)
        with torch.no_grad():
            free = dynamics.settle()
        readout = read_out(model, free.state[-1], batch, weights, objective)
        linear = Linearisation(dynamics, free.state)
        self.penalty.aim(linear)
        solved = self._solve(dynamics, linear, readout.nudge)
        metrics: dict[str, Tensor] = {"free_residual": free.residual, "adjoint_residual": solved.residual}
        adjoint = withhold_unsettled(solved.state, solved, self.adjoint_limit, metrics)
        names = relaxed_names(model)
        read = linear.parameter_vjp(adjoint / batch.num_tokens, [model.get_parameter(name) for name in names])
        penalty, growth = self.penalty.gradients(model, linear, weights)

        cost, head = dynamics.flops, model.forward_flops(*batch.inputs.shape).head
        flops = (free.steps + 1) * drive_flops(cost) + 3 * head + reading_flops(cost) + self.penalty.flops(cost)
        flops += (solved.steps + bool(self.penalty.strength)) * product_flops(cost)
        return Signal(
            plus(dict(zip(names, read, strict=True)) | readout.grads, penalty),
            readout.loss,
            readout.losses,
            Cost(tokens=batch.num_tokens, flops=flops),
            metrics | growth,
            residual_limit(self.residual_limit),
        )

    @torch.no_grad()
    def _solve(self, dynamics: Dynamics, linear: Linearisation, nudge: Tensor) -> Relaxed:
        def step(a: Tensor) -> Tensor:
            push = torch.sub(linear.vjp(a), a, alpha=dynamics.decay)
            push[-1].add_(nudge)
            return torch.add(a, push, alpha=dynamics.step_size)

        start = torch.zeros_like(linear.z)
        return relax(step, start, steps=self.steps, solver=self.solver, tolerance=self.tolerance)

    def manifest(self, model: LanguageModel) -> dict[str, Origin]:
        return fixed_point_manifest(model)

    def remarks(self) -> list[str]:
        return self.penalty.remarks()

    def state(self) -> Tree:
        return self.penalty.state()

    def load_state(self, tree: Tree) -> None:
        self.penalty.load_state(tree)
