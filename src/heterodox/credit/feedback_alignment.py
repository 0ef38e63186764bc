"""Feedback alignment: errors travel back through fixed random matrices instead of the transposed weights.

    δ_l = B_{l+1}ᵀ δ_{l+1} ⊙ f'(a_l)   in place of   δ_l = W_{l+1}ᵀ δ_{l+1} ⊙ f'(a_l)

Nothing else changes: norms, attention and residual additions pass the error on by their own exact derivative. The
forward weights come to align with the feedback, so that Bᵀδ turns into a descent direction. With `grape` the feedback
comes to align with the weights, too, by forward-mode probes (credit/grape.py).

Reference: Lillicrap, Cownden, Tweed and Akerman, "Random synaptic feedback weights support error backpropagation for
deep learning", Nature Communications 2016.
"""

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from heterodox.core import config
from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.rng import Streams
from heterodox.core.state import Tree, restore
from heterodox.core.types import Batch, Cost, Origin, Signal
from heterodox.credit.elsewhere import Elsewhere, elsewhere_refusals, feedback_manifest
from heterodox.credit.feedback import linear_layers
from heterodox.credit.feedback_matrices import FeedbackOptions
from heterodox.credit.grape import Grape
from heterodox.credit.through_feedback import through_feedback


class FeedbackAlignment:
    """Every linear layer sends its error down through its own matrix B, of the shape of W."""

    class Config(FeedbackOptions):
        name: Literal["feedback_alignment"] = "feedback_alignment"
        grape: Grape.Config | None = Field(
            None, description="align the matrices with the weights; `{}`: at the defaults"
        )
        elsewhere: Elsewhere = "local"

        @model_validator(mode="after")
        def _grape_leaves_it(self) -> "FeedbackAlignment.Config":
            """What GrAPE would undo at its first step is refused."""
            if self.grape is None:
                return self
            reasons = []
            if self.feedback == "sparse":
                reasons.append("feedback is 'sparse', but grape fills every entry at its first step; leave one out")
            if self.sparse_k is not None:
                reasons.append(f"sparse_k is {self.sparse_k}, but grape makes rows dense; leave one out")
            if self.grape.norm == "match" and self.feedback_std is not None:
                reasons.append("feedback_std has no effect where grape.norm is match; leave it out, or keep the norm")
            if self.grape.norm == "match" and self.feedback == "orthogonal_he":
                reasons.append(
                    "the gain of orthogonal_he has no effect where grape.norm is match, which matches the norm to the "
                    "weights'; use orthogonal, or keep the norm"
                )
            if reasons:
                raise ValueError("; ".join(reasons))
            return self

        def refusals(self, recipe: config.Config) -> list[str]:
            return super().refusals(recipe) + elsewhere_refusals(self.name, self.elsewhere, recipe)

        def build(self, model: LanguageModel, streams: Streams) -> "FeedbackAlignment":
            grape = None if self.grape is None else self.grape.build(streams)
            return FeedbackAlignment(self.draw_all(model, streams), grape=grape, elsewhere=self.elsewhere)

    def __init__(
        self,
        feedback: Mapping[str, Float[Tensor, "fan_out fan_in"]],
        *,
        grape: Grape | None = None,
        elsewhere: Elsewhere = "local",
    ) -> None:
        self.feedback = dict(feedback)
        self.grape = grape
        self.elsewhere: Elsewhere = elsewhere

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        probing = self.grape.align(linear_layers(model), self._aligned()) if self.grape else 0
        signal = through_feedback(model, batch, weights, objective, self.feedback, self.elsewhere)
        signal.cost += Cost(flops=probing)
        return signal

    def _aligned(self) -> dict[str, Tensor]:
        """Return the matrices that GrAPE turns: those of the hidden layers, and the output layer's if it is told to."""
        assert self.grape is not None
        return {name: matrix for name, matrix in self.feedback.items() if name != "head" or self.grape.head}

    def manifest(self, model: LanguageModel) -> dict[str, Origin]:
        return feedback_manifest(model, self.elsewhere)

    def state(self) -> Tree:
        return {"feedback": self.feedback} | ({"grape": self.grape.state()} if self.grape else {})

    def load_state(self, tree: Tree) -> None:
        restore(self.feedback, tree.get("feedback", {}), "feedback matrix")
        if self.grape:
            self.grape.load_state(tree.get("grape", {}))
