"""A rater: a small encoder that reads the first tokens of an example and gives it a score; higher is better.

    x_t = GELU(C [e_{t−1}, e_t, e_{t+1}]) + p_t,   h from x by blocks like the GPT's, but that look both ways
    z = wᵀ mean_t LN(h_t) + b

The convolution C is ours: blocks alone first have to learn which position stands beside which, before they can tell
text from the same letters in random order. Reference: Calian et al., "DataRater: Meta-learned dataset curation", 2025.
"""

from collections.abc import Sequence

import numpy as np
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


class Neighbours(nn.Module):
    """GELU of a linear map of each token and its neighbours, zeros beyond the ends: a convolution."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.proj = nn.Linear(size * width, width)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        reach = self.size // 2
        together = F.pad(x, (0, 0, reach, reach)).unfold(1, self.size, 1).flatten(2)
        return F.gelu(self.proj(together))


class Rater(nn.Module):
    """Scores of token windows. Untrained it gives every example the score 0."""

    def __init__(
        self,
        *,
        vocab_size: int,
        view: int,
        conv: int = 3,
        layers: int = 1,
        heads: int = 4,
        width: int = 64,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.view = view
        self.tok_emb = nn.Embedding(vocab_size, width)
        self.pos_emb = nn.Embedding(view, width)
        self.conv = Neighbours(width, conv) if conv > 1 else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, mlp_ratio * width, FullMix(heads), bias=True) for _ in range(layers))
        self.ln_f = LayerNorm(width)
        self.head = nn.Linear(width, 1)

    @torch.no_grad()
    def initialise(self, streams: Streams) -> None:
        """Matrices of size 1/√fan_in, the convolution's of twice that (at less the GELU hardly bends), and a head of
        zeros. Tokens count more than places: embeddings of size 1 and 1/10.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2 or name.startswith("head."):
                parameter.fill_(1.0 if (".ln" in name and name.endswith("weight")) or name == "ln_f.weight" else 0.0)
                continue
            sizes = {"tok_emb.weight": 1.0, "pos_emb.weight": 0.1, "conv.proj.weight": 2 * parameter.shape[1] ** -0.5}
            std = sizes.get(name, parameter.shape[1] ** -0.5)
            drawn = torch.randn(parameter.shape, generator=streams.generator("rule", "rater", name))
            parameter.copy_(drawn * std)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
        tokens = tokens[:, : self.view]
        x = self.conv(self.tok_emb(tokens)) + self.pos_emb.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x).mean(dim=1))[:, 0]

    def forward_flops(self, batch: int, time: int) -> ForwardFlops:
        """FLOPs of scoring `batch` windows of `time` tokens."""
        time = min(time, self.view)
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear) and m is not self.head)
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


# How well scores tell known noise from what is clean.


def auc(
    clean: Float[np.ndarray, " clean"] | Sequence[float], noise: Float[np.ndarray, " noise"] | Sequence[float]
) -> float | None:
    """The probability that a clean example scores above a noisy one, ties counting half.

    None without either, or where a score is not finite.
    """
    scores = np.concatenate([clean, noise])
    if not len(clean) or not len(noise) or not np.isfinite(scores).all():
        return None
    from scipy.stats import rankdata  # takes half a second to import

    ranks = rankdata(scores)[: len(clean)]
    return float((ranks.sum() - len(clean) * (len(clean) + 1) / 2) / (len(clean) * len(noise)))


def auc_by_kind(
    scores: Float[np.ndarray, " examples"], labels: Int[np.ndarray, " examples"], kinds: Sequence[str]
) -> dict[str, float]:
    """By the name of each kind that occurs. Label 0 is clean, label k + 1 the kind number k."""
    found = {kind: auc(scores[labels == 0], scores[labels == number]) for number, kind in enumerate(kinds, start=1)}
    return {kind: value for kind, value in found.items() if value is not None}
