"""A penalty on the Jacobian of the force, which keeps a long run on the contractive side.

    R = γ · E ‖J_Gᵀ u‖²/‖u‖²

G is what drives the state, and u a vector per example: drawn from N(0, 1), which makes R = γ·‖J_G‖²_F/d (Hutchinson's
estimator), and then multiplied by J_Gᵀ a few times, which turns it towards the eigenvectors of the largest eigenvalues.
The former is the penalty of Bai, Koltun and Kolter, "Stabilizing equilibrium models by Jacobian regularization", ICML
2021; but contraction is lost in single directions that a norm over all of them hardly sees, so the latter is the
default. z* and u count as given, so that only the blocks' parameters feel it.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.errors import CheckpointError
from heterodox.core.protocols import LanguageModel
from heterodox.core.rng import Streams
from heterodox.core.state import Tree
from heterodox.credit.fixed_point import block_parameters, product_flops
from heterodox.model.dynamics import Linearisation, Matmuls, per_example


class JacobianPenalty:
    """Finds a direction per step and differentiates the penalty. One draw serves the whole batch, on every rank."""

    def __init__(self, strength: float, streams: Streams, powers: int = 4) -> None:
        self.strength = strength
        self.streams = streams
        self.powers = powers
        self.draws = 0

    def aim(self, linear: Linearisation) -> None:
        """Point `linear` at the next u; nothing without a penalty."""
        if not self.strength:
            return
        self.draws += 1
        generator = self.streams.generator("rule", "jacobian", self.draws)
        u = torch.randn(linear.z.shape[2:], generator=generator).to(linear.z).expand_as(linear.z)
        for _ in range(self.powers):
            u = linear.vjp(u)
            u = u / per_example(u, u).sqrt().clamp_min(torch.finfo(u.dtype).tiny)
        linear.aim(u)

    def gradients(
        self, model: LanguageModel, linear: Linearisation, weights: Float[Tensor, " batch"]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Its gradient for the blocks' parameters, and ‖J_Gᵀu‖/‖u‖ for the log; empty without a penalty."""
        if not self.strength:
            return {}, {}
        with torch.enable_grad():
            pulled, u = linear.pulled, linear.probe.detach()
            squares = (per_example(pulled, pulled) / per_example(u, u)).flatten()
            penalty = self.strength * (squares * weights.to(squares)).mean()
        parameters = block_parameters(model)
        grads = torch.autograd.grad(penalty, list(parameters.values()), retain_graph=True, allow_unused=True)
        found = {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}
        return found, {"jacobian_growth": squares.detach().mean().sqrt()}

    def flops(self, cost: Matmuls) -> int:
        """FLOPs of the powers and of `gradients`: back through J_Gᵀu, and from there through what it uses of G."""
        inner = 3 * (cost.linear - cost.leaving) - cost.entering
        once = cost.linear + inner + 5 * cost.attention
        return self.powers * product_flops(cost) + once if self.strength else 0

    def remarks(self) -> list[str]:
        """That the blocks also learn from an exact gradient, where they do."""
        if not self.strength:
            return []
        return [
            f"with credit.jacobian_penalty {self.strength:g} the blocks also get the penalty's exact gradient, by "
            "double backpropagation through one evaluation of the force"
        ]

    def state(self) -> Tree:
        return {"draws": self.draws} if self.strength else {}

    def load_state(self, tree: Tree) -> None:
        if not self.strength:
            return
        if "draws" not in tree:
            raise CheckpointError("the checkpoint lacks the number of Jacobian probes: it belongs to another recipe")
        self.draws = tree["draws"]


def penalty_refusals(credit: Any) -> list[str]:
    """A refusal of powers for the probe of a penalty that is off."""
    if credit.jacobian_penalty or credit.jacobian_powers == type(credit).model_fields["jacobian_powers"].default:
        return []
    return [
        f"credit.jacobian_powers is {credit.jacobian_powers}, but they aim the probe of a penalty, and "
        "credit.jacobian_penalty is 0; make it positive, such as 0.1, or leave out the powers"
    ]
