"""The one list of what exists. A new part is one line here, and everything else finds it."""

from functools import reduce
from operator import or_
from typing import Annotated, Any

from pydantic import Field

from heterodox import credit, model, rating
from heterodox.core.config import Config
from heterodox.credit import (
    Backprop,
    DirectFeedback,
    FeedbackAlignment,
    HeadOnly,
    KolenPollack,
    MetaCritic,
    SignSymmetry,
)
from heterodox.data.corpus import File, Grammar, HuggingFace, Stdlib
from heterodox.data.tokenizer import BPE, Byte, Char, TokenizerFile
from heterodox.learner import DataRater, Gradient
from heterodox.model import GPT
from heterodox.objective import CrossEntropy, SelfDistillation
from heterodox.rating import Perplexity, Random, Uniform
from heterodox.update import SET, SGD, AdamW, Magnitude, RigL, Sparsae, Sparse, Static

PARTS: dict[str, tuple[type, ...]] = {
    "model": (GPT, model.Equilibrium),
    "objective": (CrossEntropy, SelfDistillation),
    "rating": (Uniform, Random, Perplexity, rating.DataRater),
    "credit": (
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
    "update": (SGD, AdamW, Sparse),
    "topology": (Static, Magnitude, SET, RigL, Sparsae),
    "learner": (Gradient, DataRater),
    "corpus": (Stdlib, File, HuggingFace, Grammar),
    "tokenizer": (Byte, Char, BPE, TokenizerFile),
}
"""Every part by slot."""


def part_name(part: type) -> str:
    """The name by which recipes call a part."""
    return part_config(part).model_fields["name"].default


def part_config(part: type) -> type[Config]:
    """A part's recipe section."""
    return part.Config  # pyrefly: ignore[missing-attribute]


def _section(slot: str) -> Any:
    """The type of a slot's section in a recipe: any of its parts' configurations, told apart by `name`."""
    configs: list[Any] = [part_config(part) for part in PARTS[slot]]
    union: Any = reduce(or_, configs)
    return Annotated[union, Field(discriminator="name")] if len(configs) > 1 else union


ModelConfig = _section("model")
ObjectiveConfig = _section("objective")
RatingConfig = _section("rating")
CreditConfig = _section("credit")
UpdateConfig = _section("update")
LearnerConfig = _section("learner")


def find(name: str) -> list[tuple[str, type]]:
    """Slots and parts called `name`, or `slot.name` where two slots have a part of one name."""
    return [
        (slot, part)
        for slot, parts in PARTS.items()
        for part in parts
        if name in (part_name(part), f"{slot}.{part_name(part)}")
    ]
