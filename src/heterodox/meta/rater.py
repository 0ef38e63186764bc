"""A rater: a small encoder that reads the first tokens of an example and gives it a score; higher is better.

    z = wᵀ mean_t LN(h_t) + b,   h from blocks like the GPT's, but that look both ways

Reference: Calian et al., "DataRater: Meta-learned dataset curation", 2025.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from heterodox.core.protocols import ForwardFlops
from heterodox.core.rng import Streams
from heterodox.meta.options import RaterOptions
from heterodox.model import Block, CausalMix, LayerNorm


class FullMix(CausalMix):
    """softmax(QKᵀ/√d) V: every position sees all others."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Rater(nn.Module):
    """Scores of token windows. Untrained it gives every example the score 0."""

    def __init__(
        self, *, vocab_size: int, view: int, layers: int = 2, heads: int = 4, width: int = 64, mlp_ratio: int = 4
    ) -> None:
        super().__init__()
        self.view = view
        self.tok_emb = nn.Embedding(vocab_size, width)
        self.pos_emb = nn.Embedding(view, width)
        self.blocks = nn.ModuleList(Block(width, mlp_ratio * width, FullMix(heads), bias=True) for _ in range(layers))
        self.ln_f = LayerNorm(width)
        self.head = nn.Linear(width, 1)

    @torch.no_grad()
    def initialise(self, streams: Streams) -> None:
        """Matrices from a normal distribution over √fan_in, embeddings of size 1/2, and a head of zeros."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2 or name.startswith("head."):
                parameter.fill_(1.0 if (".ln" in name and name.endswith("weight")) or name == "ln_f.weight" else 0.0)
                continue
            std = 0.5 if "emb" in name else parameter.shape[1] ** -0.5
            drawn = torch.randn(parameter.shape, generator=streams.generator("rule", "rater", name))
            parameter.copy_(drawn * std)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
        tokens = tokens[:, : self.view]
        x = self.tok_emb(tokens) + self.pos_emb.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x).mean(dim=1))[:, 0]

    def forward_flops(self, batch: int, time: int) -> ForwardFlops:
        """FLOPs of scoring `batch` windows of `time` tokens."""
        time = min(time, self.view)
        matrices = sum(m.weight.numel() for m in self.blocks.modules() if isinstance(m, nn.Linear))
        width = self.head.in_features
        return ForwardFlops(
            linear=2 * batch * time * matrices,
            attention=4 * batch * time * time * width * len(self.blocks),
            head=2 * batch * width,
        )


def build_rater(options: RaterOptions, vocab_size: int, context: int, like: Tensor | None = None) -> Rater:
    """A rater for windows of `context` tokens, of the dtype and on the device of `like`; yet to be initialised."""
    sizes = options.model_dump(exclude={"view"})
    rater = Rater(vocab_size=vocab_size, view=min(options.view or context, context), **sizes)
    for parameter in rater.parameters():  # not `rater.to`, which cannot convert the fake tensors of a plan
        parameter.data = parameter.data if like is None else parameter.data.to(like.device, like.dtype)
    return rater
