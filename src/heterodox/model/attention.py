"""Causal self-attention with separate query, key, value and output projections, and what may mix the values."""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heterodox.model.local_backward import straight_through_sigmoid

# Softmax and the product with the values as one function, with a backward pass of local terms.
#
#     A = softmax(S),   O = (A ⊙ M) V                        M a scaled dropout mask, or 1
#     dA = (dO Vᵀ) ⊙ M,   dS = A ⊙ (dA − ⟨dO, O⟩),   dV = (A ⊙ M)ᵀ dO
#
# The sum over keys in the softmax's Jacobian, Σ_j A_ij dA_ij, is the scalar ⟨dO_i, O_i⟩, which each query has at hand.
# That is exact, dropout included (and is how FlashAttention computes it: Dao, Fu, Ermon, Rudra and Ré, NeurIPS 2022).
# The `centred` form, dS_ij = A_ij ⟨dO_i, V_j − O_i⟩, does not see M: without dropout it is the same, with dropout it is
# not the gradient (and a model with dropout refuses it).


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


SigmoidBias = Literal["neg_log_n", "neg_log_row", "zero", "learned"]
SoftmaxBackward = Literal["autograd", "fused", "centred"]


class CausalMix(nn.Module):
    """softmax(QKᵀ/√d, causal) V, head by head: what attention does between its projections. No parameters."""

    def __init__(self, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout

    def forward(
        self,
        q: Float[Tensor, "*batch time width"],
        k: Float[Tensor, "*batch time width"],
        v: Float[Tensor, "*batch time width"],
    ) -> Float[Tensor, "*batch time width"]:
        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

        return self.mix(by_head(q), by_head(k), by_head(v)).transpose(-3, -2).flatten(-2)

    def mix(
        self,
        q: Float[Tensor, "*batch heads time head_width"],
        k: Float[Tensor, "*batch heads time head_width"],
        v: Float[Tensor, "*batch heads time head_width"],
    ) -> Float[Tensor, "*batch heads time head_width"]:
        """The values that each position takes in, in each head."""
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


class FusedSoftmaxMix(CausalMix):
    """The same values from `softmax_value`, whose backward pass is written out."""

    def __init__(self, heads: int, dropout: float = 0.0, *, form: Form = "fused") -> None:
        if form == "centred" and dropout:
            raise ValueError(f"the centred backward pass is not the gradient under dropout, which is {dropout}")
        super().__init__(heads, dropout)
        self.form: Form = form

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = _scores(q, k)
        scores = scores.masked_fill(~_causal(scores), -torch.inf)
        mask = None
        if self.dropout and self.training:
            mask = F.dropout(torch.ones_like(scores), self.dropout)
        return softmax_value(scores, v, mask, form=self.form)


class SigmoidMix(CausalMix):
    """σ(QKᵀ/√d + b, causal) V: no weight depends on the row's other scores.

    The bias makes up for the missing normalisation: at scores of 0, b = −ln(n − 1) makes the n weights of a row 1/n.

    - `neg_log_n`: −ln(context) in every row, as in the paper.
    - `neg_log_row`: −ln(n_i − 1), n_i the length of the causal row i. The first row's b is +∞ and its one weight 1.
    - `zero`: 0.
    - `learned`: one parameter, which starts at −ln(context).

    Reference: Ramapuram et al., "Theory, analysis, and best practices for sigmoid self-attention", 2024.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        heads: int,
        dropout: float = 0.0,
        *,
        context: int,
        bias: SigmoidBias = "neg_log_n",
        straight_through: bool = False,
    ) -> None:
        super().__init__(heads, dropout)
        if bias not in get_args(SigmoidBias):
            raise ValueError(f"there is no sigmoid bias {bias!r}; known: {', '.join(get_args(SigmoidBias))}")
        self.context = context
        self.bias_kind: SigmoidBias = bias
        self.sigmoid = straight_through_sigmoid if straight_through else torch.sigmoid
        self.bias = nn.Parameter(torch.empty(())) if bias == "learned" else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the learned bias to its start."""
        if self.bias is not None:
            self.bias.fill_(-math.log(self.context))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = _scores(q, k)
        causal = _causal(scores)
        weights = self.sigmoid((scores + self._bias(scores)).masked_fill(~causal, -torch.inf))
        return F.dropout(weights, self.dropout, self.training).to(v.dtype) @ v

    def _bias(self, scores: Float[Tensor, "*lead time time"]) -> Tensor | float:
        if self.bias is not None:
            return self.bias
        if self.bias_kind == "neg_log_row":
            below = torch.arange(scores.shape[-1], dtype=scores.dtype, device=scores.device)  # n_i − 1
            return -below.log()[:, None]
        return -math.log(self.context) if self.bias_kind == "neg_log_n" else 0.0


def causal_mix(
    heads: int,
    dropout: float = 0.0,
    *,
    context: int,
    attention: Literal["softmax", "sigmoid"] = "softmax",
    softmax_backward: SoftmaxBackward = "autograd",
    sigmoid_bias: SigmoidBias | None = None,
    straight_through_sigmoid: bool = False,
) -> CausalMix:
    """The mix that these options ask for; PyTorch's own kernel where it will do.

    No `sigmoid_bias` is `neg_log_n`. Raises `ValueError` for options of the other attention.
    """
    if attention == "sigmoid":
        if softmax_backward != "autograd":
            raise ValueError(f"softmax_backward is {softmax_backward}, but attention is sigmoid")
        bias: SigmoidBias = sigmoid_bias or "neg_log_n"
        return SigmoidMix(heads, dropout, context=context, bias=bias, straight_through=straight_through_sigmoid)
    if sigmoid_bias is not None or straight_through_sigmoid:
        raise ValueError(
            "sigmoid_bias and straight_through_sigmoid are for sigmoid attention, but attention is softmax"
        )
    if softmax_backward == "autograd":
        return CausalMix(heads, dropout)
    return FusedSoftmaxMix(heads, dropout, form=softmax_backward)


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention (Vaswani et al., 2017) around `mix`.

    q, k and v are projections of their own, so that each can have its own feedback matrix, mask or critic.
    """

    def __init__(self, width: int, mix: CausalMix, *, bias: bool) -> None:
        super().__init__()
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, width, bias=bias)
        self.v = nn.Linear(width, width, bias=bias)
        self.mix = mix
        self.o = nn.Linear(width, width, bias=bias)

    def forward(self, x: Float[Tensor, "*batch time width"]) -> Float[Tensor, "*batch time width"]:
        return self.o(self.mix(self.q(x), self.k(x), self.v(x)))


def _scores(
    q: Float[Tensor, "*lead time head_width"], k: Float[Tensor, "*lead time head_width"]
) -> Float[Tensor, "*lead time time"]:
    """QKᵀ/√d, in float32 at least, as the exponentials behind them need it."""
    scores = q @ k.mT
    return scores.to(torch.promote_types(scores.dtype, torch.float32)) * q.shape[-1] ** -0.5


def _causal(scores: Float[Tensor, "*lead time time"]) -> Bool[Tensor, "time time"]:
    """True where a row's position may look."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
