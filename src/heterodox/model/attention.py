"""Causal self-attention with separate query, key, value and output projections."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class CausalMix(nn.Module):
    """softmax(QKᵀ/√d, causal) V, head by head: what attention does between its projections. No parameters."""

    def __init__(self, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout

    def forward(
        self,
        q: Float[Tensor, "batch time width"],
        k: Float[Tensor, "batch time width"],
        v: Float[Tensor, "batch time width"],
    ) -> Float[Tensor, "batch time width"]:
        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            by_head(q),
            by_head(k),
            by_head(v),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        return mixed.transpose(1, 2).flatten(2)


class CausalSelfAttention(nn.Module):
    """Multi-head causal softmax attention (Vaswani et al., 2017).

    q, k and v are projections of their own, so that each can have its own feedback matrix, mask or critic.
    """

    def __init__(self, width: int, heads: int, *, dropout: float, bias: bool) -> None:
        super().__init__()
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, width, bias=bias)
        self.v = nn.Linear(width, width, bias=bias)
        self.mix = CausalMix(heads, dropout)
        self.o = nn.Linear(width, width, bias=bias)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        return self.o(self.mix(self.q(x), self.k(x), self.v(x)))
