"""Equilibrium propagation: gradients read off relaxed states, also where no energy exists."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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
    plus,
    product_flops,
    read_out,
    reading_flops,
    relaxed_names,
    residual_limit,
    withhold_unsettled,
)
from heterodox.credit.feedback_alignment import JacobianPenalty, penalty_refusals
from heterodox.model.dynamics import Dynamics, Linearisation, Relaxed, Solver, per_example, relax, some_steps

# Where equilibrium propagation cannot work, and why.


PLAIN = frozenset({"name", "layers", "heads", "width", "context", "mlp_ratio", "bias", "vocab_size"})
"""Options of the GPT that leave its layers fixed functions with a true derivative."""
DROWNED = 100
"""So many roundings of its state a nudge must be long; then they are 1 to 3 % of what is read off, and below more."""


def refusals(credit: Any, recipe: Any) -> list[str]:
    """Why the rule with the options `credit` cannot run within `recipe`."""
    model, reasons = recipe.model, _beta(credit.beta, recipe.run.precision)
    if model.name not in ("equilibrium", "gpt"):
        reasons.append(f"credit equilibrium needs model equilibrium or gpt, found {model.name}")
    if model.name == "gpt":
        reasons += _on_gpt(credit, model)
    if credit.clip is not None and credit.correction == "none":
        reasons.append("credit.clip limits a correction that credit.correction none has not")
    return reasons + penalty_refusals(credit)


def _beta(beta: float, precision: str) -> list[str]:
    if beta == 0:
        return ["credit.beta is 0: without a nudge nothing can be read off; expected another number, such as 0.01"]
    if precision == "bfloat16":
        return ["credit equilibrium needs run.precision float32 or float64: a nudge drowns in bfloat16's 3 digits"]
    least = DROWNED * torch.finfo(getattr(torch, precision)).eps
    if abs(beta) < least:
        return [
            f"credit.beta {beta:g} drowns in the rounding of run.precision {precision}; expected at least {least:.1g} "
            "in size, such as 0.01"
        ]
    return []


def _on_gpt(credit: Any, model: Any) -> list[str]:
    """On a feed-forward model the rule is backprop, with the steps that carry a nudge down one layer each."""
    reasons = []
    for key, field in type(model).model_fields.items():
        value = getattr(model, key)
        if key not in PLAIN and value != field.default:
            reasons.append(
                f"credit equilibrium needs layers that are fixed functions with a true derivative: model.{key} is "
                f"{value!r}, expected {field.default!r}"
            )
    if credit.nudged_steps is not None and credit.nudged_steps <= model.layers:
        reasons.append(
            f"credit.nudged_steps {credit.nudged_steps} do not carry a nudge down {model.layers} layers to the "
            f"embeddings; expected at least {model.layers + 1}"
        )
    if credit.step_size not in (None, 1):
        reasons.append(
            f"credit.step_size is {credit.step_size:g}: on model gpt only steps of 1 carry a nudge, whole, down one "
            "layer each; expected null or 1"
        )
    if credit.solver != "damped":
        reasons.append(
            f"credit.solver is {credit.solver}: on model gpt {model.layers + 1} plain steps are exact, and a mixture "
            "of them is not; expected damped"
        )
    if credit.tolerance is not None:
        reasons.append(
            f"credit.tolerance is {credit.tolerance:g}: on model gpt {model.layers + 1} steps are exact, and to stop "
            "sooner leaves the lowest layers without credit; expected null"
        )
    if credit.nudged_limit not in (None, type(credit).model_fields["nudged_limit"].default):
        reasons.append(
            f"credit.nudged_limit is {credit.nudged_limit:g}, but on model gpt the nudged phases end exactly, and "
            "nothing is left to settle; leave it out"
        )
    if credit.jacobian_penalty:
        reasons.append("credit.jacobian_penalty is for model equilibrium: a feed-forward model is always contractive")
    return reasons


# The nudged phases of equilibrium propagation.
#
#     dz/dt = F(z) ∓ β·∂L/∂z − (J − Jᵀ)(z − z*)
#
# Near z* this is Jᵀ(z − z*) ∓ β·∂L/∂z, so that (z₋ − z₊)/2β comes to rest at the adjoint. Without the correction it is
# J(z − z*) ∓ β·∂L/∂z, which has the adjoint's place only where J is symmetric.
#
# A centred pair is kept as its mean and half of its difference: z± = mean ± half. The correction acts on the half
# difference alone, for which it takes a single product with J and Jᵀ. Of the mean, which the nudges move by β² only, it
# would change the estimate by no more than the order of its error; and what drift is left of the free phase can go on.


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


class Equilibrium:
    """Equilibrium propagation: gradients read off relaxed states, also where no energy exists.

    The state relaxes freely to z*, where F(z*) = 0, and then twice more under a small nudge ±β towards lower and higher
    loss. Its answer is the adjoint, and the gradient is what the parameters do to the force:

        dz/dt = F(z) ∓ β·∂L/∂z − (J − Jᵀ)(z − z*),    a = (z₋ − z₊)/2β,    ∂L/∂θ = (∂F/∂θ)ᵀ a

    Plain equilibrium propagation (`correction: none`) lacks the third term and is right only for forces that come from
    an energy, whose Jacobian J is symmetric. Attention is not of that kind: its keys and values pass influence to later
    tokens only, so that the plain rule gives earlier ones no credit. J v and Jᵀ v are products at z*; no error is
    carried back through the relaxation.

    Everything learns: embeddings and blocks from a, head and final norm by their exact gradient at z*. On a
    feed-forward model each layer's output is a state, and the rule is backpropagation. β is chosen for each example
    such that the nudge of no position is longer than a given share of its state; or it multiplies the gradient of the
    sum over an example's tokens. Neither depends on the size of the batch.

    References: Scellier and Bengio, "Equilibrium propagation", Frontiers in Computational Neuroscience 2017; Scurria et
    al., "Equilibrium propagation for non-conservative systems", 2026. We deviate in the clip (off), in the larger
    steps, in the unit of β, and in that the correction acts on the difference of the two nudged states.

    The free phase, the nudged phases, and what their difference says of every parameter.
    """

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
