"""The one list of what exists. A new part is one line here, and everything else finds it."""

from typing import Annotated

from pydantic import Field

from heterodox import credit, model
from heterodox.core.config import Config
from heterodox.credit import Backprop, DirectFeedback, FeedbackAlignment, HeadOnly
from heterodox.data.corpus import File, Grammar, HuggingFace, Stdlib
from heterodox.data.tokenizer import BPE, Byte, Char, TokenizerFile
from heterodox.learner import Gradient
from heterodox.model import GPT
from heterodox.objective import CrossEntropy
from heterodox.rating import Uniform
from heterodox.update import SGD, AdamW

ModelConfig = Annotated[GPT.Config | model.Equilibrium.Config, Field(discriminator="name")]
ObjectiveConfig = CrossEntropy.Config
RatingConfig = Uniform.Config
CreditConfig = Annotated[
    Backprop.Config
    | FeedbackAlignment.Config
    | DirectFeedback.Config
    | HeadOnly.Config
    | credit.Equilibrium.Config
    | credit.BPTT.Config
    | credit.Implicit.Config,
    Field(discriminator="name"),
]
UpdateConfig = Annotated[SGD.Config | AdamW.Config, Field(discriminator="name")]
LearnerConfig = Gradient.Config

PARTS: dict[str, tuple[type, ...]] = {
    "model": (GPT, model.Equilibrium),
    "objective": (CrossEntropy,),
    "rating": (Uniform,),
    "credit": (Backprop, FeedbackAlignment, DirectFeedback, HeadOnly, credit.Equilibrium, credit.BPTT, credit.Implicit),
    "update": (SGD, AdamW),
    "learner": (Gradient,),
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


def find(name: str) -> list[tuple[str, type]]:
    """Slots and parts called `name`, or `slot.name` where two slots have a part of one name."""
    return [
        (slot, part)
        for slot, parts in PARTS.items()
        for part in parts
        if name in (part_name(part), f"{slot}.{part_name(part)}")
    ]
