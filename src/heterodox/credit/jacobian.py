"""A penalty on the Jacobian of the force, which keeps a long run on the contractive side.

    R = γ/d · E ‖J_Gᵀ u‖² = γ/d · ‖J_G‖²_F,    u ~ N(0, 1), one draw a step (Hutchinson's estimator)

G is what drives the state, d its number of entries per example. The states count as given, so that only the blocks'
parameters feel it. Reference: Bai, Koltun and Kolter, "Stabilizing equilibrium models by Jacobian regularization",
ICML 2021.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.errors import CheckpointError
from heterodox.core.protocols import LanguageModel
from heterodox.core.rng import Streams
from heterodox.core.state import Tree
from heterodox.credit.fixed_point import block_parameters
from heterodox.model.dynamics import Linearisation, Matmuls


class JacobianPenalty:
    """Draws a probe per step and differentiates the penalty. One probe serves the whole batch, on every rank."""

    def __init__(self, strength: float, streams: Streams) -> None:
        self.strength = strength
        self.streams = streams
        self.draws = 0

    def probe(self, state: Float[Tensor, "layers batch time width"]) -> Float[Tensor, "time width"] | None:
        """The next u; None without a penalty."""
        if not self.strength:
            return None
        self.draws += 1
        generator = self.streams.generator("rule", "jacobian", self.draws)
        return torch.randn(state.shape[2:], generator=generator).to(state)

    def gradients(
        self, model: LanguageModel, linear: Linearisation, weights: Float[Tensor, " batch"]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Its gradient for the blocks' parameters, and ‖J_G‖²_F/d for the log; empty without a penalty."""
        if not self.strength:
            return {}, {}
        with torch.enable_grad():
            squares = linear.pulled.square().mean((0, 2, 3))
            penalty = self.strength * (squares * weights.to(squares)).mean()
        parameters = block_parameters(model)
        grads = torch.autograd.grad(penalty, list(parameters.values()), retain_graph=True, allow_unused=True)
        return {n: g for n, g in zip(parameters, grads, strict=True) if g is not None}, {
            "jacobian_square": squares.detach().mean()
        }

    def flops(self, cost: Matmuls) -> int:
        """FLOPs of `gradients`: back through J_Gᵀu, and from there back through G as far as it depends on it."""
        inner = 3 * (cost.linear - cost.leaving) - cost.entering
        return cost.linear + inner + 5 * cost.attention if self.strength else 0

    def state(self) -> Tree:
        return {"draws": self.draws} if self.strength else {}

    def load_state(self, tree: Tree) -> None:
        if not self.strength:
            return
        if "draws" not in tree:
            raise CheckpointError("the checkpoint lacks the number of Jacobian probes: it belongs to another recipe")
        self.draws = tree["draws"]
