"""An ordinary feed-forward network as a dynamical system: each layer's output is a state.

    F_0(z) = −z_0 + embed(tokens),    F_l(z) = −z_l + block_l(z_{l−1})

Its fixed point is the forward pass, reached in one sweep. The Jacobian of G is strictly lower block triangular, hence
nilpotent: with ε = 1 a nudge at the output travels down one layer per step, and after as many steps as there are
states the adjoint is exact. Equilibrium propagation is backpropagation there.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heterodox.model.dynamics.dynamics import Dynamics, Matmuls
from heterodox.model.dynamics.solver import Relaxed


class FeedForward(Dynamics):
    """The layers of a feed-forward network on one batch."""

    decay = 1.0
    step_size = 1.0
    acyclic = True

    def __init__(
        self,
        embed: Callable[[], Float[Tensor, "batch time width"]],
        blocks: Sequence[nn.Module] | nn.ModuleList,
        flops: Matmuls,
    ) -> None:
        self.embed, self.blocks, self.flops = embed, list(blocks), flops
        self.nudged_steps = len(self.blocks) + 1

    def drive(self, z: Float[Tensor, "layers batch time width"]) -> Float[Tensor, "layers batch time width"]:
        driven = [block(state) for block, state in zip(self.blocks, z.unbind(0)[:-1], strict=True)]
        return torch.stack([self.embed(), *driven])

    def settle(self) -> Relaxed:
        states = [self.embed()]
        for block in self.blocks:
            states.append(block(states[-1]))
        return Relaxed(torch.stack(states), 1, states[0].new_zeros(1, len(states[0]), 1, 1))
