"""The options of a GPT: its sizes, and the switches that change its forward or its backward pass."""

from typing import Literal

from pydantic import Field, model_validator

from heterodox.core import config
from heterodox.model.attention import SigmoidBias, SoftmaxBackward
from heterodox.model.norm import Backward

CHOOSING = ("mlp_top_k", "residual_top_k", "vq_codes")
"""Switches that choose what passes on: in bfloat16's few digits they choose otherwise."""


class GPTOptions(config.Config):
    """Sizes and switches; every switch's default leaves the plain GPT as it is."""

    name: Literal["gpt"] = "gpt"
    layers: int = Field(4, ge=1, description="blocks")
    heads: int = Field(4, ge=1, description="of attention, in each block; they divide the width")
    width: int = Field(128, ge=1, description="of the residual stream")
    context: int = Field(64, ge=1, description="tokens in a window")
    mlp_ratio: int = Field(4, ge=1, description="hidden width of the MLP over the model's width")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability, on embeddings, attention and both branches")
    bias: bool = Field(False, description="in linear layers and norms (never in the head)")
    vocab_size: int | None = Field(None, ge=2, description="default: the tokenizer's")
    attention: Literal["softmax", "sigmoid"] = Field("softmax", description="what turns scores into weights")
    softmax_backward: SoftmaxBackward = Field(
        "autograd",
        description="of softmax and values, one kernel or written out; centred: not with dropout",
    )
    sigmoid_bias: SigmoidBias | None = Field(
        None,
        description="−ln(context), −ln(n − 1) for a causal row of n, 0, or learned; default: neg_log_n",
    )
    straight_through_sigmoid: bool = Field(False, description="leave σ(1 − σ) out of the backward pass")
    straight_through_gelu: bool = Field(False, description="leave the GELU's derivative out of the backward pass")
    norm_backward: Backward = Field("exact", description="of every LayerNorm; projected is exact, too")
    mlp_top_k: int | None = Field(None, ge=1, description="keep so many hidden units of the MLP, the largest")
    residual_top_k: int | None = Field(None, ge=1, description="keep so many entries of the stream after each block")
    vq_codes: int | None = Field(None, ge=2, description="frozen directions for the stream after each block")
    subspace_rank: int | None = Field(
        None, ge=1, description="dimensions of the frozen subspace that holds the stream after each block"
    )
    residual_gates: bool = Field(False, description="a learned factor for each branch, from 1")
    frozen_embeddings: bool = Field(False, description="token and position embeddings stay as they were drawn")

    @model_validator(mode="after")
    def _options_belong_to_the_attention(self) -> "GPTOptions":
        if self.attention == "softmax":
            if self.sigmoid_bias is not None:
                raise ValueError(f"sigmoid_bias is {self.sigmoid_bias}, but attention is softmax; make it sigmoid")
            if self.straight_through_sigmoid:
                raise ValueError("straight_through_sigmoid is on, but attention is softmax; make it sigmoid")
        elif self.softmax_backward != "autograd":
            raise ValueError(f"softmax_backward is {self.softmax_backward}, but attention is sigmoid; make it softmax")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> "GPTOptions":
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        hidden = self.mlp_ratio * self.width
        limits = {"mlp_top_k": hidden, "residual_top_k": self.width, "subspace_rank": self.width}
        for key, limit in limits.items():
            if (getattr(self, key) or 0) > limit:
                what = "the MLP's hidden width" if key == "mlp_top_k" else "the width"
                raise ValueError(f"{key} is {getattr(self, key)}, above {what} of {limit}")
        if self.softmax_backward == "centred" and self.dropout:
            raise ValueError(
                f"softmax_backward centred is not the gradient under dropout, which is {self.dropout}; use fused"
            )
        return self

    def refusals(self, recipe: config.Config) -> list[str]:
        chosen = [key for key in CHOOSING if getattr(self, key) is not None]
        if not chosen or recipe.run.precision != "bfloat16":  # pyrefly: ignore[missing-attribute]
            return []
        return [
            f"model.{chosen[0]} is a choice, which comes out otherwise in run.precision bfloat16's 3 digits, and the "
            "signal with it (its cosine with float32's falls below 0.99); make run.precision float32"
        ]
