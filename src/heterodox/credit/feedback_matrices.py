"""Feedback matrices: the kinds, their scales, and the recipe options that rules with such matrices share.

    gaussian        independent normal entries
    orthogonal      semi-orthogonal, BᵀB = g² I or B Bᵀ = g² I, whichever is smaller; g = 1
    orthogonal_he   √2 times that: He's gain for rectified units
    sparse          k normal entries in each row at random places, zeros elsewhere

`feedback_std` is the root mean square of *all* entries of a matrix, the zeros of a sparse one included and He's gain
not: at one `feedback_std` kinds have the same Frobenius norm (`orthogonal_he`: √2 times that) and differ in structure
alone. Without it each kind has its natural scale: 0.02, the initial weights' own, for `gaussian` and `sparse`; g = 1
for the orthogonal ones. In a transformer that is far too much: what passes a branch is added to the residual stream's
own error, and a small stream's norm magnifies it on the way, so that after a few blocks the noise is all there is.

References: Saxe, McClelland and Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep linear neural
networks", ICLR 2014 (orthogonal matrices); He, Zhang, Ren and Sun, "Delving deep into rectifiers", ICCV 2015 (gain).
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from heterodox.core import config
from heterodox.core.rng import Streams
from heterodox.credit.feedback import linear_layers

FeedbackKind = Literal["gaussian", "orthogonal", "orthogonal_he", "sparse"]

NATURAL_STD = 0.02
"""Root mean square of the entries of a `gaussian` or `sparse` matrix, if nothing else is asked."""
GAINS: dict[str, float] = {"orthogonal": 1.0, "orthogonal_he": math.sqrt(2)}
"""The singular values of an orthogonal matrix, if nothing else is asked, and over those of `feedback_std` if it is."""


def draw_feedback(
    kind: FeedbackKind,
    fan_out: int,
    fan_in: int,
    generator: torch.Generator,
    *,
    std: float | None = None,
    sparse_k: int | None = None,
) -> Float[Tensor, "fan_out fan_in"]:
    """A matrix of this kind. `std`: root mean square of all entries, without He's gain; None: the natural scale.

    `sparse_k` is the number of non-zero entries in a row of a sparse matrix, by default a sixteenth of the row. Raises
    `ValueError` where the row has no room for so many.
    """
    if kind == "gaussian":
        return torch.randn(fan_out, fan_in, generator=generator) * (NATURAL_STD if std is None else std)
    if kind == "sparse":
        k = max(1, fan_in // 16) if sparse_k is None else sparse_k
        if not 1 <= k <= fan_in:
            raise ValueError(f"sparse_k is {k}, but must be between 1 and {fan_in}, the entries of a row")
        places = torch.rand(fan_out, fan_in, generator=generator).topk(k, dim=1).indices
        entries = torch.randn(fan_out, k, generator=generator) * (NATURAL_STD if std is None else std)
        return torch.zeros(fan_out, fan_in).scatter_(1, places, entries * math.sqrt(fan_in / k))
    gain = GAINS[kind] * (1 if std is None else std * math.sqrt(max(fan_out, fan_in)))
    return nn.init.orthogonal_(torch.empty(fan_out, fan_in, dtype=torch.float64), gain, generator=generator)


class FeedbackOptions(config.Config):
    """The recipe options of every rule that draws feedback matrices."""

    name: str
    feedback: FeedbackKind = "gaussian"
    feedback_std: float | None = Field(
        None, gt=0, description="root mean square of the entries, without He's gain; null: the kind's natural scale"
    )
    sparse_k: int | None = Field(
        None, ge=1, description="non-zero entries in each row of sparse feedback; null: a sixteenth of the row"
    )

    @model_validator(mode="after")
    def _sparse_k_needs_sparse(self) -> "FeedbackOptions":
        if self.sparse_k is not None and self.feedback != "sparse":
            raise ValueError(f"sparse_k is for sparse feedback only, and feedback is {self.feedback!r}")
        return self

    def refusals(self, recipe: config.Config) -> list[str]:
        """No row is shorter than the model is wide, so that is what `sparse_k` must fit into."""
        width = recipe.model.width  # pyrefly: ignore[missing-attribute]
        if self.sparse_k is None or self.sparse_k <= width:
            return []
        return [
            f"credit.sparse_k is {self.sparse_k}, but model.width is {width}: "
            "sparse feedback cannot be denser than its matrix"
        ]

    def draw(self, fan_out: int, fan_in: int, streams: Streams, name: str) -> Float[Tensor, "fan_out fan_in"]:
        """The matrix called `name`, from the `rule` stream of that name."""
        generator = streams.generator("rule", name)
        return draw_feedback(self.feedback, fan_out, fan_in, generator, std=self.feedback_std, sparse_k=self.sparse_k)

    def draw_all(self, model: nn.Module, streams: Streams) -> dict[str, Float[Tensor, "fan_out fan_in"]]:
        """A matrix for every linear layer of `model`, of its weight's shape, dtype and device."""
        return {
            name: self.draw(layer.out_features, layer.in_features, streams, name).to(layer.weight)
            for name, layer in linear_layers(model).items()
        }
