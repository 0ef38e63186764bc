"""Feedback weights: how they take the place of Wᵀ on the way back."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from heterodox.core import slot as config
from heterodox.core.rng import Streams


class FeedbackLinear(torch.autograd.Function):
    """y = x Wᵀ + b forwards; backwards the error travels through `feedback` (of W's shape) instead of W.

    ∂x = δ B,  ∂W = δᵀ x,  ∂b = Σ δ.  Any leading dimensions. Forward mode is that of y: ẏ = ẋ Wᵀ + x Ẇᵀ + ḃ.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Float[Tensor, "*lead fan_in"],
        weight: Float[Tensor, "fan_out fan_in"],
        bias: Float[Tensor, " fan_out"] | None,
        feedback: Float[Tensor, "fan_out fan_in"],
    ) -> Float[Tensor, "*lead fan_out"]:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, feedback = inputs
        ctx.save_for_backward(x, feedback)
        ctx.save_for_forward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Float[Tensor, "*lead fan_out"]) -> tuple[Tensor | None, ...]:
        (delta,) = grad_outputs
        x, feedback = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (delta @ feedback.to(delta.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            rows = delta.reshape(-1, delta.shape[-1])
            grad_weight = (rows.T @ x.reshape(-1, x.shape[-1]).to(rows.dtype)).to(feedback.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = delta.flatten(0, -2).sum(0).to(feedback.dtype) if delta.ndim > 1 else delta
        return grad_x, grad_weight, grad_bias, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        dx, dweight, dbias, _ = tangents
        x, weight = ctx.saved_tensors
        terms = []
        if dx is not None:
            terms.append(F.linear(dx, weight))
        if dweight is not None:
            terms.append(F.linear(x, dweight))
        if dbias is not None:
            terms.append(dbias.expand(*x.shape[:-1], -1))
        return sum(terms[1:], terms[0]) if terms else None


class _WithoutForwardMode(FeedbackLinear):
    """What `torch.compile` can trace: it breaks its graph at a function that has a `jvp`."""

    jvp = torch.autograd.Function.jvp


def feedback_linear(x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor) -> Tensor:
    """`torch.nn.functional.linear` whose backward pass sends the error through `feedback`; see `FeedbackLinear`."""
    function = _WithoutForwardMode if torch.compiler.is_compiling() else FeedbackLinear
    return function.apply(x, weight, bias, feedback)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of `model`, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@contextmanager
def feedback_path(model: nn.Module, feedback: Mapping[str, Float[Tensor, "fan_out fan_in"]]) -> Iterator[None]:
    """Within the context, the named linear layers of `model` send errors back through `feedback`.

    Forward values do not change. Works on any module that holds `nn.Linear` layers; of nested contexts the innermost
    counts. Raises `KeyError` for a name that is none, and `ValueError` for a layer whose forward pass is not
    `nn.Linear`'s.
    """
    layers = linear_layers(model)
    chosen = [layers[name] for name in feedback]
    for name, layer in zip(feedback, chosen, strict=True):
        if type(layer).forward is not nn.Linear.forward:
            raise ValueError(f"layer {name!r} is a {type(layer).__name__}, whose forward pass is not nn.Linear's")
    outside = [vars(layer).get("forward") for layer in chosen]
    for layer, matrix in zip(chosen, feedback.values(), strict=True):
        layer.forward = partial(_forward, layer, matrix)
    try:
        yield
    finally:
        for layer, forward in zip(chosen, outside, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _forward(layer: nn.Linear, feedback: Tensor, x: Tensor) -> Tensor:
    return feedback_linear(x, layer.weight, layer.bias, feedback)


# Feedback matrices: the kinds, their scales, and the recipe options that rules with such matrices share.
#
#     gaussian        independent normal entries
#     orthogonal      semi-orthogonal, BᵀB = g² I or B Bᵀ = g² I, whichever is smaller; g = 1
#     orthogonal_he   √2 times that: He's gain for rectified units
#     sparse          k normal entries in each row at random places, zeros elsewhere
#
# `feedback_std` is the root mean square of *all* entries of a matrix, the zeros of a sparse one included and He's gain
# not: at one `feedback_std` kinds have the same Frobenius norm (`orthogonal_he`: √2 times that) and differ in structure
# alone. Without it each kind has its natural scale: 0.02, the initial weights' own, for `gaussian` and `sparse`; g = 1
# for the orthogonal ones. In a transformer that is far too much: what passes a branch is added to the residual stream's
# own error, and a small stream's norm magnifies it on the way, so that after a few blocks the noise is all there is.
#
# References: Saxe, McClelland and Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep linear neural
# networks", ICLR 2014 (orthogonal matrices); He, Zhang, Ren and Sun, "Delving deep into rectifiers", ICCV 2015 (gain).


FeedbackKind = Literal["gaussian", "orthogonal", "orthogonal_he", "sparse"]

NATURAL_STD = 0.02
"""Root mean square of the entries of a `gaussian` or `sparse` matrix, if nothing else is asked."""
GAINS: dict[str, float] = {"orthogonal": 1.0, "orthogonal_he": math.sqrt(2)}
"""The singular values of an orthogonal matrix, if nothing else is asked, and over those of `feedback_std` if it is."""


def draw_feedback(
    kind: FeedbackKind,
    fan_out: int,
    fan_in: int,
    generator: torch.Generator,
    *,
    std: float | None = None,
    sparse_k: int | None = None,
) -> Float[Tensor, "fan_out fan_in"]:
    """A matrix of this kind. `std`: root mean square of all entries, without He's gain; None: the natural scale.

    `sparse_k` is the number of non-zero entries in a row of a sparse matrix, by default a sixteenth of the row. Raises
    `ValueError` where the row has no room for so many.
    """
    if kind == "gaussian":
        return torch.randn(fan_out, fan_in, generator=generator) * (NATURAL_STD if std is None else std)
    if kind == "sparse":
        k = max(1, fan_in // 16) if sparse_k is None else sparse_k
        if not 1 <= k <= fan_in:
            raise ValueError(f"sparse_k is {k}, but must be between 1 and {fan_in}, the entries of a row")
        places = torch.rand(fan_out, fan_in, generator=generator).topk(k, dim=1).indices
        entries = torch.randn(fan_out, k, generator=generator) * (NATURAL_STD if std is None else std)
        return torch.zeros(fan_out, fan_in).scatter_(1, places, entries * math.sqrt(fan_in / k))
    gain = GAINS[kind] * (1 if std is None else std * math.sqrt(max(fan_out, fan_in)))
    return nn.init.orthogonal_(torch.empty(fan_out, fan_in, dtype=torch.float64), gain, generator=generator)


class FeedbackOptions(config.Config):
    """The recipe options of every rule that draws feedback matrices."""

    name: str
    feedback: FeedbackKind = "gaussian"
    feedback_std: float | None = Field(
        None, gt=0, description="root mean square of the entries, without He's gain; null: the kind's natural scale"
    )
    sparse_k: int | None = Field(
        None, ge=1, description="non-zero entries in each row of sparse feedback; null: a sixteenth of the row"
    )

    @model_validator(mode="after")
    def _sparse_k_needs_sparse(self) -> "FeedbackOptions":
        if self.sparse_k is not None and self.feedback != "sparse":
            raise ValueError(f"sparse_k is for sparse feedback only, and feedback is {self.feedback!r}")
        return self

    def refusals(self, recipe: config.Config) -> list[str]:
        """No row is shorter than the model is wide, so that is what `sparse_k` must fit into."""
        width = recipe.model.width  # pyrefly: ignore[missing-attribute]
        if self.sparse_k is None or self.sparse_k <= width:
            return []
        return [
            f"credit.sparse_k is {self.sparse_k}, but model.width is {width}: "
            "sparse feedback cannot be denser than its matrix"
        ]

    def draw(self, fan_out: int, fan_in: int, streams: Streams, name: str) -> Float[Tensor, "fan_out fan_in"]:
        """The matrix called `name`, from the `rule` stream of that name."""
        generator = streams.generator("rule", name)
        return draw_feedback(self.feedback, fan_out, fan_in, generator, std=self.feedback_std, sparse_k=self.sparse_k)

    def draw_all(self, model: nn.Module, streams: Streams) -> dict[str, Float[Tensor, "fan_out fan_in"]]:
        """A matrix for every linear layer of `model`, of its weight's shape, dtype and device."""
        return {
            name: self.draw(layer.out_features, layer.in_features, streams, name).to(layer.weight)
            for name, layer in linear_layers(model).items()
        }
