"""LayerNorm with a choice of what its backward pass does.

    z = (x − μ) / σ,   σ = √(var(x) + ε),   y = γ ⊙ z + β;   δ the error at y,  v = γ ⊙ δ

    exact, projected   ∂L/∂x = (v − mean(v) − z · mean(v ⊙ z)) / σ
    center_scale       ∂L/∂x = (v − mean(v)) / σ                     without the radial term
    straight_through   ∂L/∂x = δ                                     as if the norm were not there

`projected` is the true gradient, for any ε: from ∂σ/∂x = (x − μ)/(dσ) the radial term is z · mean(v ⊙ z) with the same
z as forwards, ε and all, and v is what arrives once γ has been applied. The other two are no gradients: `center_scale`
takes σ for a constant, `straight_through` skips even γ. γ and β learn by their own exact gradients, Σ δ ⊙ z and Σ δ, in
all of them, and forward values do not depend on the choice. Forward mode is the transpose of the backward pass.

Reference: Ba, Kiros and Hinton, "Layer normalization", 2016.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Backward = Literal["exact", "straight_through", "center_scale", "projected"]


class SurrogateLayerNorm(torch.autograd.Function):
    """LayerNorm over the last `num_dims` dimensions with the backward pass `mode`; differentiable again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Float[Tensor, "*lead"],
        weight: Tensor | None,
        bias: Tensor | None,
        num_dims: int,
        eps: float,
        mode: Backward,
    ) -> Float[Tensor, "*lead"]:
        return F.layer_norm(x, x.shape[-num_dims:], weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, num_dims, ctx.eps, ctx.mode = inputs
        ctx.dims = tuple(range(-num_dims, 0))
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        delta = _precise(grad_outputs[0])
        z, inverse = _normalise(x, ctx.dims, ctx.eps)
        leading = tuple(range(delta.ndim - len(ctx.dims)))
        v = delta if weight is None else delta * weight
        grad_x = delta if ctx.mode == "straight_through" else _project(v, z, ctx.dims, ctx.mode) * inverse
        grad_weight = None if weight is None else _sum(delta * z, leading).to(weight.dtype)
        grad_bias = _sum(delta, leading) if ctx.has_bias else None
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, weight = ctx.saved_tensors
        x_dot, weight_dot, bias_dot = tangents[:3]
        z, inverse = _normalise(x, ctx.dims, ctx.eps)
        out = torch.zeros_like(z)
        if x_dot is not None and ctx.mode == "straight_through":
            out = out + x_dot
        elif x_dot is not None:
            z_dot = _project(x_dot, z, ctx.dims, ctx.mode) * inverse
            out = out + (z_dot if weight is None else weight * z_dot)
        if weight_dot is not None:
            out = out + weight_dot * z
        return out if bias_dot is None else out + bias_dot


def layer_norm(
    x: Float[Tensor, "*lead"],
    shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backward: Backward = "exact",
) -> Float[Tensor, "*lead"]:
    """`torch.nn.functional.layer_norm` over the last dimensions, `shape`, with a choice of the backward pass.

    Raises `ValueError` for another form and for an `x` that does not end in `shape`.
    """
    if backward not in get_args(Backward):
        raise ValueError(f"there is no backward pass {backward!r}; known: {', '.join(get_args(Backward))}")
    if backward == "exact":
        return F.layer_norm(x, shape, weight, bias, eps)
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise ValueError(f"a tensor of shape {tuple(x.shape)} does not end in {tuple(shape)}")
    return SurrogateLayerNorm.apply(x, weight, bias, len(shape), eps, backward)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` with the backward pass `backward`; `exact` is PyTorch's own kernel."""

    def __init__(
        self,
        normalized_shape: int | list[int],
        *,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        backward: Backward = "exact",
    ) -> None:
        super().__init__(normalized_shape, eps=eps, elementwise_affine=elementwise_affine, bias=bias)
        self.backward_form: Backward = backward

    def forward(self, input: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, backward=self.backward_form)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backward={self.backward_form}"


def _precise(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalise(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """z and 1/σ."""
    x = _precise(x)
    centred = x - x.mean(dims, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    return centred * inverse, inverse


def _project(v: Tensor, z: Tensor, dims: tuple[int, ...], mode: str) -> Tensor:
    """v without its mean and, but for `center_scale`, without its radial part. Symmetric as a matrix."""
    centred = v - v.mean(dims, keepdim=True)
    return centred if mode == "center_scale" else centred - z * (v * z).mean(dims, keepdim=True)


def _sum(x: Tensor, leading: tuple[int, ...]) -> Tensor:
    return x.sum(leading) if leading else x
