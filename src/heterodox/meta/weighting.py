"""From scores to weights, and what is to be said of either."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.meta.options import WeightingOptions

Scores = Float[Tensor, " batch"]


class ScoreWeighting:
    """w = clamp(σ(z/τ), low, high), or w = n softmax(z/τ) over the n examples of the whole batch."""

    def __init__(self, options: WeightingOptions) -> None:
        self.options = options

    def __call__(self, scores: Scores) -> Scores:
        scaled = scores / self.options.temperature
        if self.options.kind == "softmax":
            return len(scores) * scaled.softmax(dim=0)
        return torch.sigmoid(scaled).clamp(*self.options.bounds)

    def entropy(self, scores: Scores) -> Float[Tensor, ""]:
        """Of the decision to keep an example, over ln 2; or of the distribution over examples, over ln n."""
        scaled = scores / self.options.temperature
        if self.options.kind == "softmax":
            logs = scaled.log_softmax(dim=0)
            return -(logs.exp() * logs).sum() / math.log(max(len(scores), 2))  # of one example it is 0
        keep = torch.nn.functional.softplus
        share = torch.sigmoid(scaled)
        return (share * keep(-scaled) + (1 - share) * keep(scaled)).mean() / math.log(2)

    def clamped(self, scores: Scores) -> Float[Tensor, ""]:
        """The share of examples whose weight is at a bound, where it has no derivative."""
        if self.options.kind == "softmax":
            return torch.zeros_like(scores[0])
        share = torch.sigmoid(scores / self.options.temperature)
        low, high = self.options.bounds
        return ((share <= low) | (share >= high)).to(scores.dtype).mean()

    def describe(self, scores: Scores) -> dict[str, Tensor]:
        """Mean, spread, entropy and share clamped, for the log."""
        return {
            "score_mean": scores.mean(),
            "score_std": scores.std(correction=0),
            "score_entropy": self.entropy(scores),
            "score_clamped": self.clamped(scores),
        }
