"""A transformer block: attention and an MLP, each normed at its entry and added to the residual stream."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heterodox.model.attention import CausalMix, CausalSelfAttention
from heterodox.model.bottleneck import DirectionalVQ, HardTopK
from heterodox.model.norm import Backward, LayerNorm
from heterodox.model.straight_through import StraightThroughGELU


class ResidualGate(nn.Module):
    """α x, with one learned α that starts at 1: how much of a branch the stream takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
        return self.weight * x


class MLP(nn.Module):
    """Two linear layers around a GELU, of whose outputs the `top_k` largest are kept."""

    def __init__(
        self, width: int, hidden: int, *, bias: bool, straight_through_gelu: bool = False, top_k: int | None = None
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(width, hidden, bias=bias)
        self.act = StraightThroughGELU() if straight_through_gelu else nn.GELU()
        self.top_k = HardTopK(top_k) if top_k else nn.Identity()
        self.proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
        return self.proj(self.top_k(self.act(self.fc(x))))


class Block(nn.Module):
    """x + α₁ attention(ln1(x)), then x + α₂ mlp(ln2(x)), then the stream's bottlenecks; each α is 1 without gates."""

    def __init__(
        self,
        width: int,
        hidden: int,
        mix: CausalMix,
        *,
        dropout: float = 0.0,
        bias: bool = False,
        norm_backward: Backward = "exact",
        straight_through_gelu: bool = False,
        mlp_top_k: int | None = None,
        residual_top_k: int | None = None,
        vq_codes: int | None = None,
        residual_gates: bool = False,
    ) -> None:
        super().__init__()
        self.ln1 = LayerNorm(width, bias=bias, backward=norm_backward)
        self.attn = CausalSelfAttention(width, mix, bias=bias)
        self.attn_gate = ResidualGate() if residual_gates else nn.Identity()
        self.ln2 = LayerNorm(width, bias=bias, backward=norm_backward)
        self.mlp = MLP(width, hidden, bias=bias, straight_through_gelu=straight_through_gelu, top_k=mlp_top_k)
        self.mlp_gate = ResidualGate() if residual_gates else nn.Identity()
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.top_k = HardTopK(residual_top_k) if residual_top_k else nn.Identity()
        self.vq = DirectionalVQ(width, vq_codes) if vq_codes else nn.Identity()

    def forward(self, x: Float[Tensor, "*batch time width"]) -> Float[Tensor, "*batch time width"]:
        x = x + self.drop(self.attn_gate(self.attn(self.ln1(x))))
        x = x + self.drop(self.mlp_gate(self.mlp(self.ln2(x))))
        return self.vq(self.top_k(x))
