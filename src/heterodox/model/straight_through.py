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
