"""Feedback alignment: errors travel back through fixed random matrices instead of the transposed weights.

    δ_l = B_{l+1} δ_{l+1} ⊙ f'(a_l)   in place of   δ_l = W_{l+1}ᵀ δ_{l+1} ⊙ f'(a_l)

Nothing else changes: norms, attention and residual additions pass the error on by their own exact derivative. The
forward weights come to align with the feedback, so that B δ turns into a descent direction.

Reference: Lillicrap, Cownden, Tweed and Akerman, "Random synaptic feedback weights support error backpropagation for
deep learning", Nature Communications 2016.
"""

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from heterodox.core import config
from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.rng import Streams
from heterodox.core.state import Tree, restore
from heterodox.core.types import Batch, Cost, Origin, Signal
from heterodox.credit.backprop import differentiate
from heterodox.credit.elsewhere import (
    Elsewhere,
    backprop_elsewhere,
    feedback_manifest,
)
from heterodox.credit.feedback import feedback_path, gaussian, linear_layers


class FeedbackAlignment:
    """Every linear layer sends its error down through its own fixed matrix B, of the shape of W."""

    class Config(config.Config):
        name: Literal["feedback_alignment"] = "feedback_alignment"
        feedback: Literal["gaussian"] = "gaussian"
        feedback_std: float = Field(0.02, gt=0, description="standard deviation of B's entries")
        elsewhere: Elsewhere = "local"

        def build(self, model: LanguageModel, streams: Streams) -> "FeedbackAlignment":
            matrices = {
                name: gaussian(layer.out_features, layer.in_features, self.feedback_std, streams, name).to(layer.weight)
                for name, layer in linear_layers(model).items()
            }
            return FeedbackAlignment(matrices, elsewhere=self.elsewhere)

    def __init__(
        self, feedback: Mapping[str, Float[Tensor, "fan_out fan_in"]], *, elsewhere: Elsewhere = "local"
    ) -> None:
        self.feedback = dict(feedback)
        self.elsewhere = elsewhere

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        names = [name for name, origin in self.manifest(model).items() if origin in ("feedback", "exact")]
        with feedback_path(model, self.feedback):
            signal = differentiate(model, batch, weights, objective, names)
        signal.cost = Cost(tokens=batch.num_tokens, flops=model.forward_flops(*batch.inputs.shape).with_backward)
        if self.elsewhere == "backprop":
            grads, cost = backprop_elsewhere(model, batch, weights, objective)
            signal.grads |= grads
            signal.cost += cost
        return signal

    def manifest(self, model: LanguageModel) -> dict[str, Origin]:
        return feedback_manifest(model, self.elsewhere)

    def state(self) -> Tree:
        return {"feedback": self.feedback}

    def load_state(self, tree: Tree) -> None:
        restore(self.feedback, tree.get("feedback", {}), "feedback matrix")
