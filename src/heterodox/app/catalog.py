"""The one list of what exists. A new part is one line here, and everything else finds it.

Parts of other distributions stand beside these: `core/slot.py` finds them.
"""

from heterodox import credit, model, rating
from heterodox.core.protocols import Credit, LanguageModel, Learner, Objective, Rating, Update
from heterodox.core.slot import Slot
from heterodox.credit import (
    Backprop,
    DirectFeedback,
    FeedbackAlignment,
    HeadOnly,
    KolenPollack,
    MetaCritic,
    SignSymmetry,
)
from heterodox.data.parts import CORPORA, TOKENIZERS
from heterodox.learner import DataRater, Gradient
from heterodox.model import GPT
from heterodox.objective import CrossEntropy, SelfDistillation
from heterodox.rating import Perplexity, Random, Uniform
from heterodox.update import SGD, AdamW, Sparse
from heterodox.update.sparse.methods import TOPOLOGIES

SLOTS = {
    "model": Slot("model", LanguageModel, (GPT, model.Equilibrium)),
    "objective": Slot("objective", Objective, (CrossEntropy, SelfDistillation)),
    "rating": Slot("rating", Rating, (Uniform, Random, Perplexity, rating.DataRater)),
    "credit": Slot(
        "credit",
        Credit,
        (
            Backprop,
            SignSymmetry,
            KolenPollack,
            FeedbackAlignment,
            DirectFeedback,
            HeadOnly,
            credit.Equilibrium,
            credit.BPTT,
            credit.Implicit,
            MetaCritic,
        ),
    ),
    "update": Slot("update", Update, (SGD, AdamW, Sparse)),
    "topology": TOPOLOGIES,
    "learner": Slot("learner", Learner, (Gradient, DataRater)),
    "corpus": CORPORA,
    "tokenizer": TOKENIZERS,
}
"""What there is to choose, and from what: our own parts, and those of other distributions."""

PARTS = {name: tuple(slot.own.values()) for name, slot in SLOTS.items()}
"""Our own parts by slot."""

ModelConfig = SLOTS["model"].section()
ObjectiveConfig = SLOTS["objective"].section()
RatingConfig = SLOTS["rating"].section()
CreditConfig = SLOTS["credit"].section()
UpdateConfig = SLOTS["update"].section()
LearnerConfig = SLOTS["learner"].section()


def find(name: str) -> list[tuple[str, type]]:
    """Slots and parts called `name`, or `slot.name` where two slots have a part of one name.

    Raises `RecipeError` for a part of another distribution that cannot be used.
    """
    found = []
    for title, slot in SLOTS.items():
        part = slot.get(name.removeprefix(f"{title}."))
        if part is not None:
            found.append((title, part))
    return found
