"""Kolen–Pollack: errors travel back through matrices that learn by the very update of the weights they stand for."""

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from heterodox.core import slot as config
from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.rng import Streams
from heterodox.core.state import Tree, restore
from heterodox.core.types import Batch, Origin, Signal
from heterodox.credit.base import Elsewhere, elsewhere_refusals, feedback_manifest, through_feedback
from heterodox.credit.feedback import FeedbackOptions


class KolenPollack:
    """Kolen–Pollack: errors travel back through matrices that learn by the very update of the weights they stand for.

        δ_l = B_{l+1}ᵀ δ_{l+1} ⊙ f'(a_l),   ΔW = ΔB = −η δ xᵀ,   both with weight decay λ:
        W − B  decays as  Π_t (1 − η_t λ)

    B starts with no relation to W. Since both ends of a synapse see δ and x, both can make the same change without
    telling each other; whatever set them apart at the start is forgotten at the rate of the decay. That holds for every
    update that treats both alike and shrinks them in proportion, so B simply is a parameter of the run's update,
    learning rate, clip and all: `SGD` (momentum turns the product into a linear recurrence) and `AdamW` (product as
    above). Without weight decay W − B stays what it was, and they align only as far as what both have learnt outgrows
    it.

    References: Kolen and Pollack, "Backpropagation without weight transport", ICNN 1994; Akrout, Wilson, Humphreys,
    Lillicrap and Tweed, "Deep learning without weight transport", NeurIPS 2019.

    Every linear layer sends its error down through a matrix B that is updated as W is.
    """

    class Config(FeedbackOptions):
        name: Literal["kolen_pollack"] = "kolen_pollack"
        elsewhere: Elsewhere = "local"

        def refusals(self, recipe: config.Config) -> list[str]:
            return super().refusals(recipe) + elsewhere_refusals(self.name, self.elsewhere, recipe)

        def build(self, model: LanguageModel, streams: Streams) -> "KolenPollack":
            return KolenPollack(self.draw_all(model, streams), elsewhere=self.elsewhere)

    def __init__(
        self, feedback: Mapping[str, Float[Tensor, "fan_out fan_in"]], *, elsewhere: Elsewhere = "local"
    ) -> None:
        self.feedback = {name: nn.Parameter(matrix, requires_grad=False) for name, matrix in feedback.items()}
        self.elsewhere: Elsewhere = elsewhere

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        signal = through_feedback(model, batch, weights, objective, self.feedback, self.elsewhere)
        for name, matrix in self.feedback.items():
            if (gradient := signal.grads.get(f"{name}.weight")) is not None:  # a frozen weight's feedback stays, too
                signal.own_parameters[f"feedback:{name}"] = matrix
                signal.own_grads[f"feedback:{name}"] = gradient
        return signal

    def manifest(self, model: LanguageModel) -> dict[str, Origin]:
        return feedback_manifest(model, self.elsewhere)

    def state(self) -> Tree:
        return {"feedback": self.feedback}

    def load_state(self, tree: Tree) -> None:
        restore(self.feedback, tree.get("feedback", {}), "feedback matrix")
