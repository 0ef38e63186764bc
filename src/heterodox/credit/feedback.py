"""Feedback weights: how they take the place of Wᵀ on the way back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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
