"""Whether a function's derivatives are what they should be, in float64."""

import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.func import jvp, vjp

from tests.measured import Outcome, note, unheard

JVP_WARNING = "ignore:.*jit.script.*:DeprecationWarning"
"""What torch itself warns of at the first jvp."""
LEADS = [(), (3,), (2, 3)]
"""Leading shapes."""


def draw(*shape: int, seed: int = 0, requires_grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)


def is_exact(function, *inputs: Tensor) -> bool:
    """Whether backward, batched and forward-mode derivatives are those of finite differences."""
    try:
        return gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    except GradcheckError:
        return False


def is_not_exact(function, *inputs: Tensor) -> bool:
    """What agrees nevertheless, or does before the first difference, is not what is claimed."""
    with unheard():
        holds = not is_exact(function, *inputs)
    if holds:
        note(Outcome("apart"))
    return holds


def forward_mode_is_the_transpose(function, x: Tensor) -> bool:
    """⟨δ, J t⟩ = ⟨Jᵀ δ, t⟩, and not 0."""
    x = x.detach()
    out, pull = vjp(function, x)
    delta, tangent = draw(*out.shape, seed=1, requires_grad=False), draw(*x.shape, seed=2, requires_grad=False)
    forth, back = (delta * jvp(function, (x,), (tangent,))[1]).sum(), (pull(delta)[0] * tangent).sum()
    return bool(back.abs() > 1e-3) and torch.allclose(forth, back, rtol=1e-12)
