"""The options of the equilibrium model, and why some of the GPT's are not among them."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from heterodox.core import config
from heterodox.model.config import GPTOptions
from heterodox.model.dynamics import Solver, some_steps

TRAINABLE_BY = ("equilibrium", "bptt", "implicit", "backprop", "head_only")
UNTRUE = "a force is applied again and again, and credit reads it off its true Jacobian, which this option falsifies"
JUMPS = "a force that jumps from one choice to another need not have a fixed point"
REASONS = {
    "softmax_backward": UNTRUE,
    "straight_through_sigmoid": UNTRUE,
    "straight_through_gelu": UNTRUE,
    "norm_backward": UNTRUE,
    "vq_codes": UNTRUE,
    "mlp_top_k": JUMPS,
    "residual_top_k": JUMPS,
}
"""Why the force cannot have these switches of the GPT."""


class EquilibriumOptions(config.Config):
    """Sizes, the force, and how it relaxes."""

    name: Literal["equilibrium"] = "equilibrium"
    layers: int = Field(1, ge=1, description="blocks in the joint state")
    heads: int = Field(4, ge=1)
    width: int = Field(128, ge=1)
    context: int = Field(64, ge=1, description="tokens in a window")
    mlp_ratio: int = Field(4, ge=0, description="hidden width of the MLP over the model's width; 0: no MLP")
    layer_norm: bool = Field(True, description="normalise what attention and MLP see")
    bias: bool = False
    scale: float = Field(1.0, gt=0, description="strength of attention and MLP in the force, s")
    damping: float = Field(1.0, ge=0, description="of the force, c")
    step_size: float | None = Field(None, gt=0, description="of the Euler steps, ε; null: 1 / (1 + s·c)")
    steps: int = Field(20, ge=1, description="steps of a relaxation; with a tolerance, at most")
    tolerance: float | None = Field(
        None, gt=0, description="a position stops once it moves by less than this share of itself; null: never"
    )
    solver: Solver = "damped"
    embedding_std: float = Field(1.0, gt=0, description="of x, token and position embedding together")
    weight_std: float = Field(0.02, gt=0, description="of the initial weight matrices")
    dropout: float = Field(0.0, description="only 0: a force that changes from step to step has no fixed point")
    vocab_size: int | None = Field(None, ge=2, description="default: the tokenizer's")

    _some_steps = field_validator("steps", mode="before")(some_steps)

    @model_validator(mode="before")
    @classmethod
    def _no_switches(cls, data: Any) -> Any:
        """An unknown key is a slip; one of the GPT's has a reason not to be here."""
        for key in data if isinstance(data, dict) else ():
            if key in GPTOptions.model_fields and key not in cls.model_fields:
                reason = REASONS.get(key, "its block is softmax attention and an MLP, and learns as a whole")
                raise ValueError(f"{key} is a switch of model gpt, which model equilibrium has not: {reason}")
        return data

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value:
            raise ValueError(f"{value} cannot be: a force that changes from step to step has no fixed point")
        return value

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "EquilibriumOptions":
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        return self

    def refusals(self, recipe: config.Config) -> list[str]:
        credit = recipe.credit.name  # pyrefly: ignore[missing-attribute]
        if credit in TRAINABLE_BY:
            return []
        return [
            f"credit {credit} cannot train the equilibrium model: only {', '.join(TRAINABLE_BY)} know a force that "
            "is applied again and again, and another rule's errors would not be those of its true Jacobian"
        ]
