"""The first derivatives of a dynamical system at a state."""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from heterodox.model.dynamics.dynamics import Dynamics


class Linearisation:
    """The Jacobian J_G of G at a state, applied from both sides without ever being formed.

    One evaluation of G with autograd's graph serves any number of products. J_G v is the derivative of the linear map
    u ↦ J_Gᵀ u, which needs no forward-mode automatic differentiation. Of F the Jacobian is J_G − d·1, so that
    J − Jᵀ = J_G − J_Gᵀ.
    """

    def __init__(self, dynamics: Dynamics, z: Float[Tensor, "layers batch time width"]) -> None:
        self.z = z.detach().requires_grad_()
        self.probe = torch.zeros_like(z).requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the only kernel that can be differentiated twice
            self.output = dynamics.drive(self.z)

    def aim(self, u: Float[Tensor, "layers batch time width"]) -> None:
        """Hold `pulled` at u from now on. The products do not depend on it."""
        assert "pulled" not in vars(self), "pulled has been computed at another vector"
        self.probe = u.detach().clone().requires_grad_()

    @cached_property
    def pulled(self) -> Float[Tensor, "layers batch time width"]:
        """J_Gᵀ u at the u that was aimed at, differentiable in the parameters."""
        return torch.autograd.grad(self.output, self.z, self.probe, create_graph=True)[0]

    def vjp(self, u: Float[Tensor, "layers batch time width"]) -> Float[Tensor, "layers batch time width"]:
        """J_Gᵀ u."""
        return torch.autograd.grad(self.output, self.z, u, retain_graph=True)[0]

    def jvp(self, v: Float[Tensor, "layers batch time width"]) -> Float[Tensor, "layers batch time width"]:
        """J_G v."""
        return torch.autograd.grad(self.pulled, self.probe, v, retain_graph=True)[0]

    def parameter_vjp(
        self, a: Float[Tensor, "layers batch time width"], parameters: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """(∂G/∂θ)ᵀ a for each parameter θ: what it does to the force, each block seen on its own."""
        return torch.autograd.grad(self.output, parameters, a, retain_graph=True)
