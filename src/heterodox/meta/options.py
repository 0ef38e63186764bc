"""The options of a rater, and of what trains it."""

from typing import Any, Literal

from pydantic import Field, model_validator

from heterodox.core.config import Config
from heterodox.meta.schedule import Schedule

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


class RaterOptions(Config):
    """The encoder: what it sees of an example, and its size."""

    view: int | None = Field(None, ge=1, description="tokens of a window that it reads, the first; null: all")
    conv: int = Field(3, ge=1, description="neighbouring tokens that are read together, under the blocks; odd; 1: none")
    layers: int = Field(1, ge=0, description="blocks")
    heads: int = Field(4, ge=1, description="of attention; they divide the width")
    width: int = Field(64, ge=1, description="of the encoder")
    mlp_ratio: int = Field(4, ge=1, description="hidden width of the MLP over the width")

    @model_validator(mode="after")
    def _can_be_built(self) -> "RaterOptions":
        if self.width % self.heads:
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
    low: float = Field(0.05, ge=0, lt=1, description="sigmoid: no weight is lower")
    high: float = Field(1.0, gt=0, le=1, description="sigmoid: no weight is higher")
    entropy: float = Field(0.0, ge=0, description="penalty on weights of low entropy, which keeps scores apart from 0")

    @model_validator(mode="after")
    def _low_is_below_high(self) -> "WeightingOptions":
        if self.low >= self.high:
            raise ValueError(f"weighting.low {self.low:g} is not below weighting.high {self.high:g}")
        return self


class MetaOptions(Config):
    """Inner runs, the window that is differentiated, and the rater's own optimizer."""

    rater: RaterOptions = RaterOptions()  # pyrefly: ignore[missing-argument]
    weighting: WeightingOptions = WeightingOptions()  # pyrefly: ignore[missing-argument]
    population: int = Field(1, ge=1, description="inner models")
    reset: Literal["staggered", "fresh"] = Field(
        "staggered", description="persistent inner models that start anew in turn, or new ones in every round"
    )
    lifetime: int = Field(500, ge=1, description="staggered: steps after which an inner model starts anew")
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
        if self.reset == "staggered" and self.lifetime < self.inner_steps:
            raise ValueError(
                f"a lifetime of {self.lifetime} steps is shorter than the {self.inner_steps} inner_steps of a round"
            )
        return self
