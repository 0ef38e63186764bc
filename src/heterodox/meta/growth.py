"""How far an adjoint grows on its way back through a window, and what to say of one that explodes."""

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.types import Diagnosis

EXPLODED = 1e3
"""Growth of the adjoint over a window that is worth a warning. One that is not a number counts as infinite."""


def adjoint_growth(norms: Float[Tensor, " steps_and_end"]) -> Float[Tensor, ""]:
    """How many times its size at the end the adjoint reaches on the way back; infinite if a norm is not a number."""
    growth = norms.max() / norms[0].clamp_min(torch.finfo(norms.dtype).tiny)
    return growth.nan_to_num(torch.inf, torch.inf)


def explosion(growth: float, window: int, remedy: str) -> Diagnosis:
    """A warning if the adjoint has grown too far along a window of so many steps."""
    if growth <= EXPLODED:
        return Diagnosis()
    text = (
        f"the adjoint grew {growth:.3g} times along a window of {window} steps: the meta-gradient is that of a chaotic "
        f"run; {remedy}"
    )
    return Diagnosis(warnings=[text])
