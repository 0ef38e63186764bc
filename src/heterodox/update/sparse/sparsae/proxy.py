"""The composite score of a candidate: lower is better.

    P = w_CE · z(CE) + w_div · z(D) − w_act · z(A),   z(x) = (x − μ) / (σ + ε)

- CE: cross-entropy on the micro-batch.
- D, how far the layers' densities are from the network's: `rms`, √(mean_l (d_l − d)²), or `kl`, Σ_l s_l ln(s_l / s)
  over sparsities. (The source subtracts a sparsity from a density; we compare like with like.)
- A, gradient activity: mean_l ‖g_l ⊙ M_l‖ / √(active connections of l).

μ and σ follow the winners' values exponentially; they begin as those of the first generation. w_div and w_act fall to 0
with the square of the events that are left, within a share of all events.
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from heterodox.core import config
from heterodox.core.state import Tree

EPSILON = 1e-5
PARTS = ("ce", "diversity", "activity")


class ProxyOptions(config.Config):
    """Weights of the score's parts, and how they change."""

    ce: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    diversity: float = Field(0.01, ge=0, description="weight of the layers' unevenness, in the first event")
    activity: float = Field(0.005, ge=0, description="weight of gradient activity, in the first event")
    form: Literal["rms", "kl"] = Field("rms", description="how unevenness is measured")
    anneal: float = Field(0.7, gt=0, le=1, description="share of the events after which only cross-entropy counts")
    decay: float = Field(0.99, ge=0, lt=1, description="of the running mean and variance")


class Proxy:
    """Running statistics and the scores made with them."""

    def __init__(self, options: ProxyOptions) -> None:
        self.options = options
        self.mean: dict[str, float] = {}
        self.variance: dict[str, float] = {}

    def weights(self, done: float) -> dict[str, float]:
        """The parts' weights when a share `done` of all events is over."""
        left = max(0.0, 1 - done / self.options.anneal) ** 2
        return {
            "ce": self.options.ce,
            "diversity": self.options.diversity * left,
            "activity": self.options.activity * left,
        }

    def score(self, candidates: list[dict[str, Any]], done: float) -> None:
        """Write `z` and `score` into each candidate that is finite; the others get infinity."""
        finite = [candidate for candidate in candidates if candidate["finite"]]
        if not self.mean and finite:
            for part in PARTS:
                values = [candidate[part] for candidate in finite]
                self.mean[part] = sum(values) / len(values)
                self.variance[part] = sum((value - self.mean[part]) ** 2 for value in values) / len(values)
        weights = self.weights(done)
        for candidate in candidates:
            candidate["z"], candidate["score"] = None, math.inf
            if candidate["finite"]:
                z = {
                    part: (candidate[part] - self.mean[part]) / (math.sqrt(self.variance[part]) + EPSILON)
                    for part in PARTS
                }
                candidate["z"] = z
                candidate["score"] = sum((-1 if part == "activity" else 1) * weights[part] * z[part] for part in PARTS)

    def follow(self, winner: dict[str, Any]) -> None:
        """Let mean and variance follow the winner's values."""
        if not winner["finite"]:
            return
        rate = 1 - self.options.decay
        for part in PARTS:
            away = winner[part] - self.mean[part]
            self.mean[part] += rate * away
            self.variance[part] += rate * (away * away - self.variance[part])

    def state(self) -> Tree:
        return {"mean": self.mean, "variance": self.variance}

    def load_state(self, tree: Tree) -> None:
        self.mean, self.variance = dict(tree["mean"]), dict(tree["variance"])


def unevenness(counts: list[int], sizes: list[int], form: Literal["rms", "kl"]) -> float:
    """How far the layers' densities (`rms`) or sparsities (`kl`) are from the network's."""
    density = sum(counts) / sum(sizes)
    densities = [count / size for count, size in zip(counts, sizes, strict=True)]
    if form == "rms":
        return math.sqrt(sum((here - density) ** 2 for here in densities) / len(sizes))
    return sum((1 - here) * math.log((1 - here) / (1 - density)) for here in densities if here < 1)


def layer_activities(signal: Float[Tensor, " entries"], mask: Tensor, sizes: list[int]) -> Float[Tensor, " layers"]:
    """‖g_l ⊙ M_l‖ / √active_l of each layer; 0 for one without connections."""
    parts = zip((signal * mask).split(sizes), mask.split(sizes), strict=True)
    return torch.stack([part.norm() / active.sum().clamp(min=1).sqrt() for part, active in parts])
