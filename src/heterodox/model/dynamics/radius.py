"""The spectral radius of a linear map that can only be applied.

Arnoldi's iteration projects the map A onto the Krylov space of one vector. The eigenvalues of that small matrix,
complex pairs included, approximate the largest ones of A. (The growth of a single vector, as in power iteration, never
settles for a complex pair.) The space grows until the residual ‖A x − λ x‖ of the largest Ritz pair is small: λ is then
an eigenvalue of a map that lies no further than that from A. Reference: Saad, "Numerical methods for large eigenvalue
problems", 2011, chapter 6. We do not restart: it would save memory, but on causal maps, which are far from normal, it
took more products to a larger error.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_ROUNDING = 10  # a new direction no longer than so many roundings is none


@dataclass(frozen=True)
class SpectralRadius:
    """The largest absolute eigenvalue found for each example, and the residual of its unit eigenvector."""

    values: Float[Tensor, " batch"]
    residuals: Float[Tensor, " batch"]
    products: int
    """Applications of the map that this took."""

    def within(self, tolerance: float) -> Bool[Tensor, " batch"]:
        """Where the residual is at most `tolerance` times the radius."""
        return self.residuals <= tolerance * self.values


@torch.no_grad()
def spectral_radius(
    apply: Callable[[Tensor], Tensor],
    start: Float[Tensor, "layers batch time width"],
    *,
    tolerance: float = 2e-3,
    most: int = 96,
) -> SpectralRadius:
    """The spectral radius for each example, to a residual of `tolerance` times itself or after `most` applications.

    `apply` maps states to states, linearly and each example on its own; `start` spans the Krylov space and should have
    a share in every direction. An unfinished radius is mostly too small. NaN where the map is not finite. The memory is
    that of one state per application.
    """
    layers, batch, time, width = start.shape
    size = layers * time * width
    most = min(most, size)
    w = start.movedim(1, 0).reshape(batch, size)
    basis = w.new_empty(batch, most, size)
    hessenberg = w.new_zeros(batch, most + 1, most)
    v = _unit(w, 0.0)
    for column in range(most):
        basis[:, column] = v
        w = apply(v.view(batch, layers, time, width).movedim(0, 1)).movedim(1, 0).reshape(batch, size)
        length, known = w.norm(dim=-1), basis[:, : column + 1]
        for _ in range(2):  # once more, or rounding makes the basis lose its right angles
            product = torch.einsum("bkn,bn->bk", known, w)
            hessenberg[:, : column + 1, column] += product
            w = w - torch.einsum("bkn,bk->bn", known, product)
        v = _unit(w, _ROUNDING * torch.finfo(w.dtype).eps * length)
        hessenberg[:, column + 1, column] = torch.einsum("bn,bn->b", v, w)
        products = column + 1
        if products % 8 == 0 or products == most:
            found = _largest(hessenberg[:, : products + 1, :products], products)
            if bool((found.within(tolerance) | found.values.isnan()).all()):
                break
    return found


def _unit(w: Float[Tensor, "batch size"], least: float | Float[Tensor, " batch"]) -> Float[Tensor, "batch size"]:
    """w at length 1, or 0 where it is not longer than `least`: there the Krylov space has come to its end."""
    length = w.norm(dim=-1)
    return torch.where(length > least, 1 / length, torch.where(length.isnan(), length, 0.0))[:, None] * w


def _largest(hessenberg: Float[Tensor, "batch rows columns"], products: int) -> SpectralRadius:
    """The largest Ritz value of each example, and its residual."""
    sound = hessenberg.isfinite().all(-1).all(-1)
    square = torch.where(sound[:, None, None], hessenberg[:, :-1], 0.0)
    eigenvalues, vectors = torch.linalg.eig(square)
    index = eigenvalues.abs().argmax(-1)
    each = torch.arange(len(index), device=index.device)
    values = eigenvalues.abs()[each, index]
    residuals = hessenberg[:, -1, -1].abs() * vectors[each, -1, index].abs()
    return SpectralRadius(torch.where(sound, values, torch.nan), torch.where(sound, residuals, torch.nan), products)
