"""Equilibrium propagation: gradients read off relaxed states, also where no energy exists.

The state relaxes freely to z*, where F(z*) = 0, and then twice more under a small nudge ±β towards lower and higher
loss. Its answer is the adjoint, and the gradient is what the parameters do to the force:

    dz/dt = F(z) ∓ β·∂L/∂z − (J − Jᵀ)(z − z*),    a = (z₋ − z₊)/2β,    ∂L/∂θ = (∂F/∂θ)ᵀ a

Plain equilibrium propagation (`correction: none`) lacks the third term and is right only for forces that come from an
energy, whose Jacobian J is symmetric. Attention is not of that kind: its keys and values pass influence to later tokens
only, so that the plain rule gives earlier ones no credit. J v and Jᵀ v are products at z*; no error is carried back
through the relaxation.

Everything learns: embeddings and blocks from a, head and final norm by their exact gradient at z*. On a feed-forward
model each layer's output is a state, and the rule is backpropagation. β is chosen for each example such that the nudge
of no position is longer than a given share of its state; or it multiplies the gradient of the sum over an example's
tokens. Neither depends on the size of the batch.

References: Scellier and Bengio, "Equilibrium propagation", Frontiers in Computational Neuroscience 2017; Scurria et
al., "Equilibrium propagation for non-conservative systems", 2026. We deviate in the clip (off), in the larger steps, in
the unit of β, and in that the correction acts on the difference of the two nudged states.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor

from heterodox.core import config
from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.rng import Streams
from heterodox.core.state import Tree
from heterodox.core.types import Batch, Cost, Origin, Signal
from heterodox.credit.equilibrium_refusals import refusals
from heterodox.credit.fixed_point import (
    drive_flops,
    dynamics_of,
    fixed_point_manifest,
    plus,
    product_flops,
    read_out,
    reading_flops,
    relaxed_names,
    residual_limit,
    withhold_unsettled,
)
from heterodox.credit.jacobian import JacobianPenalty
from heterodox.credit.nudged import BetaUnit, NudgedPhase, strength
from heterodox.model.dynamics import Linearisation, Solver, some_steps


class Equilibrium:
    """The free phase, the nudged phases, and what their difference says of every parameter."""

    class Config(config.Config):
        name: Literal["equilibrium"] = "equilibrium"
        correction: Literal["asymmetric", "none"] = Field(
            "asymmetric", description="the term −(J − Jᵀ)(z − z*); none: the plain rule"
        )
        nudge: Literal["centered", "one_sided"] = Field("centered", description="±β, or +β and the free state")
        loss_gradient: Literal["frozen", "live"] = Field(
            "frozen", description="∂L/∂z of the nudge: at z*, or anew at every state on the way"
        )
        beta: float = Field(0.01, description="strength of the nudge; not 0")
        beta_unit: BetaUnit = Field(
            "state", description="no position's nudge is longer than β times its state; gradient: it is β·∂L/∂z"
        )
        nudged_steps: int | None = Field(
            None, ge=1, description="of a nudged phase, at most; null: 15, and on the GPT its layers and one more"
        )
        step_size: float | None = Field(None, gt=0, description="of the nudged phases, ε; null: the model's")
        solver: Solver = Field("damped", description="of the nudged phases")
        tolerance: float | None = Field(
            None, gt=0, description="an example stops once it moves by less than this share of its displacement"
        )
        clip: float | None = Field(
            None, gt=0, description="longest correction over the rest of the force; null: as it comes"
        )
        residual_limit: float | None = Field(
            0.1, gt=0, description="relative last step of the free phase past which a run stops; null: never"
        )
        nudged_limit: float | None = Field(
            0.1,
            gt=0,
            description="relative last step of the nudged phases past which an example gets no credit; not on the GPT, "
            "where they end exactly",
        )
        jacobian_penalty: float = Field(0.0, ge=0, description="strength of the penalty on the Jacobian, γ")
        jacobian_powers: int = Field(4, ge=0, description="steps that turn its probe to the largest eigenvalues")

        _some_steps = field_validator("nudged_steps", mode="before")(some_steps)

        def refusals(self, recipe: config.Config) -> list[str]:
            return refusals(self, recipe)

        def build(self, model: LanguageModel, streams: Streams) -> "Equilibrium":
            options = self.model_dump(
                exclude={"name", "correction", "nudge", "jacobian_penalty", "jacobian_powers", "loss_gradient"}
            )
            return Equilibrium(
                JacobianPenalty(self.jacobian_penalty, streams, self.jacobian_powers),
                corrected=self.correction == "asymmetric",
                centered=self.nudge == "centered",
                live=self.loss_gradient == "live",
                **options,
            )

    def __init__(
        self,
        penalty: JacobianPenalty | None = None,
        *,
        beta: float = 0.01,
        beta_unit: BetaUnit = "state",
        corrected: bool = True,
        centered: bool = True,
        live: bool = False,
        nudged_steps: int | None = None,
        step_size: float | None = None,
        solver: Solver = "damped",
        tolerance: float | None = None,
        clip: float | None = None,
        residual_limit: float | None = 0.1,
        nudged_limit: float | None = 0.1,
    ) -> None:
        self.penalty = penalty or JacobianPenalty(0.0, Streams(0))
        self.beta, self.beta_unit = beta, beta_unit
        self.corrected, self.centered, self.live = corrected, centered, live
        self.nudged_steps, self.step_size = nudged_steps, step_size
        self.solver, self.tolerance = solver, tolerance
        self.clip = clip
        self.residual_limit, self.nudged_limit = residual_limit, nudged_limit

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        dynamics = dynamics_of(model, batch)
        with torch.no_grad():
            free = dynamics.settle()
        readout = read_out(model, free.state[-1], batch, weights, objective)

        def gradient(hidden: Tensor) -> Tensor:
            return read_out(model, hidden, batch, weights, objective).nudge if self.live else readout.nudge

        linear = Linearisation(dynamics, free.state)
        self.penalty.aim(linear)
        phase = NudgedPhase(
            strength(self.beta, self.beta_unit, free.state[-1], readout.nudge),
            steps=self.nudged_steps or dynamics.nudged_steps,
            step_size=self.step_size or dynamics.step_size,
            centered=self.centered,
            corrected=self.corrected,
            clip=self.clip,
            solver=self.solver,
            tolerance=self.tolerance,
        )
        adjoint, nudged = phase.adjoint(dynamics, linear, gradient)
        metrics: dict[str, Tensor] = {"free_residual": free.residual, "nudged_residual": nudged.residual}
        limit = None if dynamics.acyclic else self.nudged_limit
        adjoint = withhold_unsettled(adjoint, nudged, limit, metrics)
        names = relaxed_names(model)
        read = linear.parameter_vjp(adjoint / batch.num_tokens, [model.get_parameter(name) for name in names])
        penalty, growth = self.penalty.gradients(model, linear, weights)

        cost, phases = dynamics.flops, 2 if self.centered else 1
        head = model.forward_flops(*batch.inputs.shape).head
        flops = (free.steps + 1) * drive_flops(cost) + 3 * head + reading_flops(cost) + self.penalty.flops(cost)
        flops += nudged.steps * phases * (drive_flops(cost) + (3 * head if self.live else 0))
        if self.corrected:
            flops += 2 * nudged.steps * product_flops(cost)
        if self.corrected or self.penalty.strength:
            flops += product_flops(cost)
        return Signal(
            plus(dict(zip(names, read, strict=True)) | readout.grads, penalty),
            readout.loss,
            readout.losses,
            Cost(tokens=batch.num_tokens, flops=flops),
            metrics | growth,
            residual_limit(self.residual_limit),
        )

    def manifest(self, model: LanguageModel) -> dict[str, Origin]:
        return fixed_point_manifest(model)

    def remarks(self) -> list[str]:
        return self.penalty.remarks()

    def state(self) -> Tree:
        return self.penalty.state()

    def load_state(self, tree: Tree) -> None:
        self.penalty.load_state(tree)
