"""Backpropagation through time: through the steps of the relaxation, as through the layers of a deep network."""

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
from heterodox.credit.backprop import trainable
from heterodox.credit.equilibrium.shared import (
    drive_flops,
    dynamics_of,
    needs_equilibrium_model,
    plus,
    product_flops,
    readout_exact,
    residual_limit,
)
from heterodox.credit.feedback_alignment import JacobianPenalty, penalty_refusals
from heterodox.model.dynamics import Linearisation, Relaxed, some_steps
from heterodox.model.equilibrium import BlockDynamics

DIVERGING = (
    "The free phase no longer reaches a fixed point: the gradient is that of the steps that were taken, but where they "
    "lead depends on their number. Likely remedies: credit.jacobian_penalty, a lower update.lr, more model.steps, more "
    "model.damping."
)


class BPTT:
    """Backpropagation through time: through the steps of the relaxation, as through the layers of a deep network.

        z_{k+1} = z_k + ε·F(z_k),    ∂L/∂θ = Σ_k ε·(∂F/∂θ)ᵀ δ_k,    δ_{k−1} = (1 + ε·J)ᵀ δ_k

    The exact gradient of what the model computes in its finite number of steps. All of their activations are kept. With
    `through: n` only the last n steps are differentiated, from a state taken as given. References: Werbos,
    "Backpropagation through time: what it does and how to do it", Proceedings of the IEEE 1990; Ernoult, Grollier,
    Querlioz, Bengio and Scellier, "Updates of equilibrium prop match gradients of backprop through time in an RNN with
    static input", NeurIPS 2019.

    Autograd's gradient through the last steps of the relaxation, by default through all.
    """

    class Config(config.Config):
        name: Literal["bptt"] = "bptt"
        through: int | None = Field(None, ge=1, description="steps to differentiate, the last ones; null: all")
        residual_limit: float | None = Field(
            0.1, gt=0, description="relative last step of the relaxation past which a run stops; null: never"
        )
        jacobian_penalty: float = Field(0.0, ge=0, description="strength of the penalty on the Jacobian, γ")
        jacobian_powers: int = Field(4, ge=0, description="steps that turn its probe to the largest eigenvalues")

        _some_steps = field_validator("through", mode="before")(some_steps)

        def refusals(self, recipe: config.Config) -> list[str]:
            return needs_equilibrium_model("bptt", recipe) or _refusals(self, recipe)

        def build(self, model: LanguageModel, streams: Streams) -> "BPTT":
            penalty = JacobianPenalty(self.jacobian_penalty, streams, self.jacobian_powers)
            return BPTT(penalty, through=self.through, residual_limit=self.residual_limit)

    def __init__(
        self,
        penalty: JacobianPenalty | None = None,
        *,
        through: int | None = None,
        residual_limit: float | None = 0.1,
    ) -> None:
        self.penalty = penalty or JacobianPenalty(0.0, Streams(0))
        self.through = through
        self.residual_limit = residual_limit

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        dynamics = dynamics_of(model, batch)
        assert isinstance(dynamics, BlockDynamics)
        before, relaxed = self._relax(dynamics)
        losses = objective.losses(model.readout(relaxed.state[-1]), batch)
        loss = (losses * weights).mean()
        names = trainable(model)
        grads = torch.autograd.grad(loss, [model.get_parameter(name) for name in names], retain_graph=True)
        penalty, metrics, flops = self._penalise(model, dynamics, relaxed.state.detach(), weights)
        cost, head = dynamics.flops, model.forward_flops(*batch.inputs.shape).head
        flops += (before + 3 * relaxed.steps) * drive_flops(cost) + 3 * head
        if before:
            flops -= cost.entering  # the given state asks for no error
        return Signal(
            plus(dict(zip(names, grads, strict=True)), penalty),
            loss.detach(),
            losses.detach(),
            Cost(tokens=batch.num_tokens, flops=flops),
            metrics | {"free_residual": relaxed.residual},
            residual_limit(self.residual_limit, DIVERGING),
        )

    def _relax(self, dynamics: BlockDynamics) -> tuple[int, Relaxed]:
        """Steps without a graph, and the relaxation with one."""
        if self.through is None or self.through >= dynamics.model.steps:
            return 0, dynamics.settle()
        with torch.no_grad():
            given = dynamics.settle_from(dynamics.start, dynamics.model.steps - self.through)
        return given.steps, dynamics.settle_from(given.state, self.through)

    def _penalise(
        self, model: LanguageModel, dynamics: BlockDynamics, state: Tensor, weights: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        if not self.penalty.strength:
            return {}, {}, 0
        linear = Linearisation(dynamics, state)
        self.penalty.aim(linear)
        grads, metrics = self.penalty.gradients(model, linear, weights)
        cost = dynamics.flops
        return grads, metrics, drive_flops(cost) + product_flops(cost) + self.penalty.flops(cost)

    def manifest(self, model: LanguageModel) -> dict[str, Origin]:
        return readout_exact(model, "backprop" if self.through is None else "equilibrium")

    def remarks(self) -> list[str]:
        return self.penalty.remarks()

    def state(self) -> Tree:
        return self.penalty.state()

    def load_state(self, tree: Tree) -> None:
        self.penalty.load_state(tree)


def _refusals(credit: BPTT.Config, recipe: Any) -> list[str]:
    model, reasons = recipe.model, penalty_refusals(credit)
    if credit.through is not None and credit.through > model.steps:
        reasons.append(f"credit.through {credit.through} is more than the {model.steps} model.steps that there are")
    if credit.through is not None and model.tolerance is not None:
        reasons.append(
            f"credit.through {credit.through} counts back from the last step, but with model.tolerance "
            f"{model.tolerance:g} which step is the last is known only once it was taken, and a relaxation cut in two "
            "would differentiate fewer; make the tolerance null, or through"
        )
    if credit.through is not None and model.solver == "anderson":
        reasons.append(
            "credit.through cuts a relaxation in two, which model.solver anderson would not survive: use damped"
        )
    return reasons
