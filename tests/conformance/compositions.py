"""Parts of all slots in one tiny recipe: `compose` asks for it, `two_steps` runs it."""

from typing import Any

from heterodox.app import catalog
from heterodox.app.recipe import Recipe
from heterodox.app.session import open_session
from heterodox.core.comm import Solo
from heterodox.core.types import StepReport
from tests.conformance import combinations
from tests.conformance.combinations import EQUILIBRIUM, UPDATE_VARIANTS
from tests.tiny import tiny_recipe

SMALL = {"layers": 1, "heads": 1, "width": 8}
RATER = {
    "rater": SMALL, "population": 1, "lifetime": 6, "inner_steps": 4, "backprop_steps": 2, "batch_size": 4,
    "val_batches": 1, "val_batch_size": 4, "lr": 0.01,
}  # fmt: skip
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "objective": {"self_distillation": {"warmup_steps": 1}},
    "rating": {
        "random": {"keep": 0.5},
        "perplexity": {"keep": 0.5},
        "data_rater": {"keep": 0.5, "train": RATER | {"rounds": 1}},
    },
    "learner": {"data_rater": RATER},
    "model": {"equilibrium": EQUILIBRIUM},
}
"""What parts need at this size besides their names."""
RUN = {"budget": {"steps": 3}, "batch_size": 4, "eval_batches": 1}
"""Of which two are run: a mask that changes less and less does not change in the last."""


TOPOLOGIES = {variant["topology"]["name"]: name for name, variant in reversed(UPDATE_VARIANTS.items())}
"""The variant of the update `sparse` that has a topology at its defaults."""


def parts(slot: str) -> list[str]:
    """Every choice for a slot; the update `sparse` stands for each of its topologies."""
    names = list(catalog.SLOTS[slot].own)
    if slot == "update":
        return [name for name in names if name != "sparse"] + [TOPOLOGIES[name] for name in parts("topology")]
    return names


def compose(credit: str = "backprop", update: str = "adamw", **others: str) -> Recipe:
    """The tiny recipe with these parts, on the model that the rule needs if none is named.

    Raises `RecipeError` where it is refused.
    """
    return tiny_recipe(**sections_of(credit, update, **others))


def sections_of(credit: str, update: str, **others: str) -> dict[str, Any]:
    """What `compose` lays over the tiny recipe."""
    sections = {slot: {"name": name} | OPTIONS.get(slot, {}).get(name, {}) for slot, name in others.items()}
    return combinations.sections_of(credit, update, run=RUN, **sections)


def two_steps(recipe: Recipe) -> list[StepReport]:
    session = open_session(recipe, Solo(), "cpu")
    reports = [session.learner.step(session.loader.next_batch()) for _ in range(2)]
    session.learner.settle()
    return reports
