"""The options of a rater, and of what trains it."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from heterodox.core.slot import Config
from heterodox.meta.gradient import Schedule

Control = Literal["detached", "shuffled", "constant", "auxiliary"]
"""Ways in which meta-learning must fail, to show that nothing else does the work.

- `detached`: the weights count, but no derivative leads back to the rater: it stays as it was drawn.
- `shuffled`: each example is weighted by another one's score.
- `constant`: every weight is 1; the rater learns nothing and the inner models train as if there were none.
- `auxiliary`: every weight is 1, and scores are regressed on minus the inner model's losses: no meta-gradient.
"""


SURROGATES = {
    "softmax_backward": "autograd", "straight_through_sigmoid": False, "straight_through_gelu": False,
    "norm_backward": "exact", "mlp_top_k": None, "residual_top_k": None, "vq_codes": None, "subspace_rank": None,
}  # fmt: skip
"""Switches of the GPT, at the settings where its gradient is the derivative of its loss and has one itself."""


def surrogates(model: Any, who: str) -> list[str]:
    """Reasons why the gradient of a GPT with these options cannot be differentiated, one for each switch."""
    return [
        f"{who} differentiates the gradient of the model, which model.{key} makes another than the derivative of its "
        "loss; leave it out"
        for key, value in SURROGATES.items()
        if getattr(model, key) != value
    ]


def too_wide(options: "MetaOptions", model: Any, where: str) -> list[str]:
    """A reason where the rater, whose options are in the section `where`, would read more than a window has."""
    view = options.rater.view
    if view is None or view <= model.context:
        return []
    return [f"{where}.rater.view is {view}, but a window has the model's context of {model.context} tokens; lower it"]


LOW, HIGH = 0.05, 1.0
"""Bounds of sigmoid weights."""
LIFETIME = 500
"""Steps of a persistent inner model."""


class RaterOptions(Config):
    """The encoder: what it sees of an example, and its size."""

    view: int | None = Field(None, ge=1, description="tokens of a window that it reads, the first; null: all")
    conv: int = Field(3, ge=1, description="neighbouring tokens that are read together, under the blocks; odd; 1: none")
    layers: int = Field(1, ge=0, description="blocks")
    heads: int = Field(4, ge=1, description="of attention in the blocks; they divide the width")
    width: int = Field(64, ge=1, description="of the encoder")
    mlp_ratio: int = Field(4, ge=1, description="of the blocks: hidden width of the MLP over the width")

    @model_validator(mode="after")
    def _can_be_built(self) -> "RaterOptions":
        for option in () if self.layers else ("heads", "mlp_ratio"):
            if (given := getattr(self, option)) != type(self).model_fields[option].default:
                raise ValueError(f"rater.{option} {given} is of blocks, and rater.layers is 0; leave one out")
        if self.layers and self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a rater's width of {self.width}")
        if self.conv % 2 == 0:
            raise ValueError(f"rater.conv {self.conv} is even, but a token has as many neighbours before as behind it")
        if self.conv == 1 and not self.layers:
            raise ValueError("a rater without blocks and with conv 1 sees no token beside another; raise either")
        return self


class WeightingOptions(Config):
    """How scores become weights."""

    kind: Literal["sigmoid", "softmax"] = Field(
        "softmax", description="of each score by itself, or over the whole batch (times its size)"
    )
    temperature: float = Field(1.0, gt=0, description="scores are divided by it")
    low: float | None = Field(None, ge=0, lt=1, description=f"sigmoid: no weight is lower; default: {LOW:g}")
    high: float | None = Field(None, gt=0, le=1, description=f"sigmoid: no weight is higher; default: {HIGH:g}")
    entropy: float = Field(0.0, ge=0, description="penalty on weights of low entropy, which keeps scores apart from 0")

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "WeightingOptions":
        if self.kind == "softmax":
            for option in ("low", "high"):
                if getattr(self, option) is not None:
                    raise ValueError(f"{option} is for sigmoid weights only, and weighting.kind is softmax")
        low, high = self.bounds
        if low >= high:
            raise ValueError(f"weighting.low {low:g} is not below weighting.high {high:g}")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which sigmoid weights are clamped."""
        return LOW if self.low is None else self.low, HIGH if self.high is None else self.high


class MetaOptions(Config):
    """Inner runs, the window that is differentiated, and the rater's own optimizer."""

    rater: RaterOptions = RaterOptions()  # pyrefly: ignore[missing-argument]
    weighting: WeightingOptions = WeightingOptions()  # pyrefly: ignore[missing-argument]
    population: int = Field(1, ge=1, description="inner models")
    reset: Literal["staggered", "fresh"] = Field(
        "staggered", description="persistent inner models that start anew in turn, or new ones in every round"
    )
    lifetime: int | None = Field(
        None, ge=1, description=f"staggered: steps after which an inner model starts anew; default: {LIFETIME}"
    )
    inner_steps: int = Field(2, ge=1, description="training steps of each inner model in a round")
    backprop_steps: int = Field(2, ge=1, description="the last of them, which the meta-gradient goes through")
    batch_size: int = Field(32, ge=1, description="examples in an inner step")
    micro_batch: int | None = Field(None, ge=1, description="of them in the model at a time; default: all")
    val_batches: int = Field(2, ge=1, description="batches of the meta split behind a round")
    val_batch_size: int = Field(32, ge=1, description="examples in each of them")
    inner_clip: float | None = Field(1.0, gt=0, description="largest norm of an inner gradient; null: no clip")
    inner_warmup: int = Field(0, ge=0, description="linear warm-up of an inner model's learning rate, in its steps")
    eps_root: float = Field(1e-12, ge=0, description="under the root of AdamW's second moment, which it keeps smooth")
    schedule: Schedule = Field("sqrt", description="which states of the window are stored")
    slots: int | None = Field(None, ge=1, description="binomial: how many; default: about log₂ of the window")
    graphs: int = Field(1, ge=0, description="steps whose graph is kept at a time for the way back, which spares work")
    lr: float = Field(3e-3, gt=0, description="learning rate of the rater, by AdamW")
    weight_decay: float = Field(0.01, ge=0, description="of the rater")
    clip: float | None = Field(1.0, gt=0, description="largest norm of a meta-gradient; null: no clip")
    ema: float = Field(0.99, ge=0, lt=1, description="of the rater's weights: what scores, and what is kept")
    control: Control | None = Field(None, description="a way in which it must fail")

    @model_validator(mode="after")
    def _fits(self) -> "MetaOptions":
        if self.backprop_steps > self.inner_steps:
            raise ValueError(
                f"backprop_steps {self.backprop_steps} is longer than the {self.inner_steps} inner_steps of a round; "
                "lower it"
            )
        if self.weighting.kind == "softmax" and self.batch_size == 1:
            raise ValueError("softmax weights over a batch of one example are always 1; raise batch_size")
        if self.slots is not None and self.schedule != "binomial":
            raise ValueError(f"slots are for the schedule binomial, but it is {self.schedule}")
        if self.graphs > self.backprop_steps:
            raise ValueError(
                f"graphs {self.graphs} is more than there are in a window of {self.backprop_steps} backprop_steps; "
                "lower it"
            )
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ValueError(
                f"micro_batch {self.micro_batch} is more than the batch_size of {self.batch_size}; lower it"
            )
        if self.micro_batch is not None and self.graphs > 1:
            raise ValueError(f"micro_batch keeps no graph for the way back, but graphs is {self.graphs}; leave one out")
        if self.reset == "fresh" and self.lifetime is not None:
            raise ValueError(f"lifetime {self.lifetime} is for the reset staggered only; fresh ones live for a round")
        life, inner = self.steps_of_life, self.inner_steps
        if self.reset == "staggered" and life < inner:
            raise ValueError(f"a lifetime of {life} steps is shorter than the {inner} inner_steps of a round")
        if self.control == "auxiliary" and self.batch_size == 1:
            raise ValueError("control auxiliary compares the losses of a batch, and batch_size is 1; raise it")
        if not self.moves and self.weighting.entropy:
            raise ValueError(
                f"under control {self.control} the rater stays as it was drawn, but weighting.entropy "
                f"{self.weighting.entropy:g} would move it; leave one out"
            )
        return self

    @property
    def steps_of_life(self) -> int:
        """Of a persistent inner model, before it starts anew."""
        return LIFETIME if self.lifetime is None else self.lifetime

    @property
    def asks(self) -> bool:
        """Whether the meta-gradient is asked for; under `detached` it is, and must be zero."""
        return self.control in (None, "shuffled", "detached")

    @property
    def moves(self) -> bool:
        """Whether the rater may move at all."""
        return self.control in (None, "shuffled", "auxiliary")


# From scores to weights, and what is to be said of either.


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
