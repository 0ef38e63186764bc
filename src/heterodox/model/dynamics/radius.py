"""The spectral radius of a linear map that can only be applied.

A few plain powers shed what is transient in a map that is far from normal; then Arnoldi's iteration projects the map
onto the Krylov space of what is left, and the eigenvalues of that small matrix, complex pairs included, approximate
the largest ones. (The growth of a single vector, as in plain power iteration, never settles for a complex pair.)
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.model.dynamics.solver import per_example


@torch.no_grad()
def spectral_radius(
    apply: Callable[[Tensor], Tensor],
    start: Float[Tensor, "layers batch time width"],
    *,
    powers: int = 10,
    dimension: int = 12,
) -> Float[Tensor, " batch"]:
    """The largest absolute eigenvalue for each example, from `powers + dimension` applications.

    `apply` maps states to states, linearly and each example on its own; `start` is where the powers begin.
    """
    v = _unit(start)
    for _ in range(powers):
        v = _unit(apply(v))
    basis = [v]
    size = start.shape[1]
    hessenberg = torch.zeros(size, dimension + 1, dimension, dtype=start.dtype, device=start.device)
    for column in range(dimension):
        w = apply(basis[column])
        for _ in range(2):  # once more, or rounding makes the basis lose its right angles
            for row, b in enumerate(basis):
                product = per_example(w, b)
                hessenberg[:, row, column] += product.flatten()
                w = w - product * b
        norm = per_example(w, w).sqrt()
        hessenberg[:, column + 1, column] = norm.flatten()
        basis.append(w / norm.clamp_min(torch.finfo(w.dtype).tiny))
    return torch.linalg.eigvals(hessenberg[:, :dimension]).abs().amax(-1)


def _unit(v: Tensor) -> Tensor:
    return v / per_example(v, v).sqrt().clamp_min(torch.finfo(v.dtype).tiny)
