"""Causal self-attention with separate query, key, value and output projections."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class CausalSelfAttention(nn.Module):
    """Multi-head causal softmax attention (Vaswani et al., 2017).

    q, k and v are projections of their own, so that each can have its own feedback matrix, mask or critic.
    """

    def __init__(self, width: int, heads: int, *, dropout: float, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, width, bias=bias)
        self.v = nn.Linear(width, width, bias=bias)
        self.o = nn.Linear(width, width, bias=bias)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        batch, time, width = x.shape

        def by_head(y: Tensor) -> Tensor:
            return y.view(batch, time, self.heads, width // self.heads).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            by_head(self.q(x)),
            by_head(self.k(x)),
            by_head(self.v(x)),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        return self.o(mixed.transpose(1, 2).reshape(batch, time, width))
