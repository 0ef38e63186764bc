"""Softmax and the product with the values as one function, with a backward pass of local terms.

    A = softmax(S),   O = (A ⊙ M) V                        M a scaled dropout mask, or 1
    dA = (dO Vᵀ) ⊙ M,   dS = A ⊙ (dA − ⟨dO, O⟩),   dV = (A ⊙ M)ᵀ dO

The sum over keys in the softmax's Jacobian, Σ_j A_ij dA_ij, is the scalar ⟨dO_i, O_i⟩, which each query has at hand.
That is exact, dropout included (and is how FlashAttention computes it: Dao, Fu, Ermon, Rudra and Ré, NeurIPS 2022).
The `centred` form, dS_ij = A_ij ⟨dO_i, V_j − O_i⟩, does not see M: without dropout it is the same, with dropout it is
not the gradient (and a model with dropout refuses it).
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Form = Literal["fused", "centred"]


class SoftmaxValue(torch.autograd.Function):
    """softmax(scores) ⊙ mask times values; A is made again from the scores, so that it is differentiable twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        scores: Float[Tensor, "*lead queries keys"],
        values: Float[Tensor, "*lead keys width"],
        mask: Float[Tensor, "*lead queries keys"] | None,
        form: Form,
    ) -> Float[Tensor, "*lead queries width"]:
        return _dropped(scores.softmax(-1), mask).to(values.dtype) @ values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, form = inputs
        ctx.save_for_backward(*tensors, output)
        ctx.save_for_forward(*tensors, output)
        ctx.centred = form == "centred"

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (delta,) = grad_outputs
        scores, values, mask, output = ctx.saved_tensors
        weights = scores.softmax(-1)
        grad_scores = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_weights = (delta @ values.to(delta.dtype).mT).to(weights.dtype)
            if not ctx.centred:
                grad_weights = _dropped(grad_weights, mask)
            baseline = (delta * output).sum(-1, keepdim=True)
            grad_scores = weights * (grad_weights - baseline)
        if ctx.needs_input_grad[1]:
            grad_values = (_dropped(weights, mask).to(delta.dtype).mT @ delta).to(values.dtype)
        return grad_scores, grad_values, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        scores, values, mask, output = ctx.saved_tensors
        scores_dot, values_dot = tangents[:2]
        weights = scores.softmax(-1)
        out = torch.zeros_like(output)
        if scores_dot is not None:
            change = weights * scores_dot
            seen = change if ctx.centred else _dropped(change, mask)
            out = out + seen.to(values.dtype) @ values - change.sum(-1, keepdim=True) * output
        if values_dot is not None:
            out = out + _dropped(weights, mask).to(values.dtype) @ values_dot
        return out


def softmax_value(
    scores: Float[Tensor, "*lead queries keys"],
    values: Float[Tensor, "*lead keys width"],
    mask: Float[Tensor, "*lead queries keys"] | None = None,
    *,
    form: Form = "fused",
) -> Float[Tensor, "*lead queries width"]:
    """(softmax(scores) ⊙ mask) values. Keys that a query may not see have scores of −inf; each must see one.

    `mask` is a dropout mask, kept entries scaled already; with it, the backward form `centred` is not the gradient.
    """
    return SoftmaxValue.apply(scores, values, mask, form)


def _dropped(weights: Tensor, mask: Tensor | None) -> Tensor:
    return weights if mask is None else weights * mask
