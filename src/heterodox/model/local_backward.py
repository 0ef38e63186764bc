"""Straight-through estimators: a function's value forwards, the identity backwards.

    y = f(x),   ∂L/∂x := ∂L/∂y

Reference: Bengio, Léonard and Courville, "Estimating or propagating gradients through stochastic neurons for
conditional computation", 2013. Where f has a derivative, leaving it out is an approximation and the gradient is not
exact. Forward mode leaves it out as well, so that both modes describe one (surrogate) function.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class StraightThrough(torch.autograd.Function):
    """function(x), of x's shape, whose derivative is taken to be 1 everywhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[[Tensor], Tensor], x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return function(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Float[Tensor, "*shape"]) -> tuple[Tensor | None, ...]:
        return None, grad_outputs[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return tangents[1].clone()


def straight_through(function: Callable[[Tensor], Tensor], x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`function(x)` forwards, the identity backwards. `function` keeps the shape and makes a new tensor."""
    return StraightThrough.apply(function, x)


def straight_through_sigmoid(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """σ(x) without the factor σ(1 − σ) on the way back."""
    return StraightThrough.apply(torch.sigmoid, x)


def straight_through_gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The exact (erf) GELU without its derivative on the way back."""
    return StraightThrough.apply(F.gelu, x)


class StraightThroughSigmoid(nn.Sigmoid):
    """`straight_through_sigmoid` as a module."""

    def forward(self, input: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return straight_through_sigmoid(input)


class StraightThroughGELU(nn.GELU):
    """`straight_through_gelu` as a module."""

    def forward(self, input: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return straight_through_gelu(input)


# Bottlenecks: what a layer or the residual stream may say is cut down to few entries, few directions, few dimensions.
#
# HardTopK        y_i = x_i where |x_i| is among the k largest, else 0
# DirectionalVQ   y = ‖h‖ · c_j,  j = argmax_j ⟨c_j, h⟩      c_j fixed, of unit norm; straight-through backwards
# FrozenSubspace  y = h Q Qᵀ                                 Q fixed, orthonormal columns


def hard_top_k(x: Float[Tensor, "*lead width"], k: int) -> Float[Tensor, "*lead width"]:
    """The k entries of largest magnitude along the last dimension, the others 0, forwards and backwards.

    Its own derivative wherever the winners do not change, so autograd is exact; k = width is the identity.
    """
    if not 1 <= k <= x.shape[-1]:
        raise ValueError(f"top-k keeps {k} of {x.shape[-1]} entries; expected 1 to {x.shape[-1]}")
    index = x.detach().abs().topk(k, dim=-1, sorted=False).indices
    return x.masked_fill(torch.ones_like(x, dtype=torch.bool).scatter(-1, index, False), 0.0)


class HardTopK(nn.Module):
    """`hard_top_k` as a module (k-winners-take-all; Makhzani and Frey, "k-sparse autoencoders", ICLR 2014)."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
        return hard_top_k(x, self.k)

    def extra_repr(self) -> str:
        return f"k={self.k}"


class DirectionalVQ(nn.Module):
    """Each vector's direction is replaced by the nearest of a frozen codebook's; its length stays.

    Backwards the error passes as it is (van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation
    learning", NeurIPS 2017), so the gradient is not exact. The codebook never learns.
    """

    codebook: Float[Tensor, "codes width"]

    def __init__(self, width: int, num_codes: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if num_codes < 1:
            raise ValueError(f"a codebook needs at least one code; found {num_codes}")
        self.register_buffer("codebook", torch.empty(num_codes, width))
        self.draw(generator)

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None) -> None:
        """Draw the codes: independent directions, all equally likely."""
        self.codebook.copy_(nn.functional.normalize(torch.randn(self.codebook.shape, generator=generator), dim=-1))

    def forward(self, h: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
        with torch.autocast(h.device.type, enabled=False):  # the stream stays as precise as it is
            return straight_through(self.quantise, h)

    def quantise(self, h: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
        """The nearest code of each vector, as long as the vector."""
        codebook = self.codebook.to(h.dtype)
        return codebook[(h @ codebook.T).argmax(-1)] * h.norm(dim=-1, keepdim=True)

    def extra_repr(self) -> str:
        return f"width={self.codebook.shape[1]}, num_codes={self.codebook.shape[0]}"


class FrozenSubspace(nn.Module):
    """Orthogonal projection onto a fixed random subspace; linear, and exact backwards. rank = width is the identity."""

    basis: Float[Tensor, "width rank"]

    def __init__(self, width: int, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not 1 <= rank <= width:
            raise ValueError(f"a subspace of {width} dimensions has ranks from 1 to {width}; found {rank}")
        self.register_buffer("basis", torch.empty(width, rank))
        self.draw(generator)

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None) -> None:
        """Draw an orthonormal basis of a random subspace."""
        drawn = torch.randn(self.basis.shape, generator=generator, dtype=torch.float64)
        self.basis.copy_(torch.linalg.qr(drawn).Q)

    def forward(self, h: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
        basis = self.basis.to(h.dtype)
        with torch.autocast(h.device.type, enabled=False):  # the stream stays as precise as it is
            return h @ basis @ basis.T

    def extra_repr(self) -> str:
        return f"width={self.basis.shape[0]}, rank={self.basis.shape[1]}"
