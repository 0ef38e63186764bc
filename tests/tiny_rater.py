"""Recipes of tiny runs that meta-train a rater, and of runs that use one."""

from typing import Any

from heterodox.app.recipe import Recipe
from tests.tiny import tiny_recipe

SMALL = {"layers": 1, "heads": 1, "width": 8}
LEARNER = {
    "name": "data_rater", "rater": SMALL, "population": 2, "lifetime": 6, "inner_steps": 4, "backprop_steps": 2,
    "batch_size": 4, "val_batches": 1, "val_batch_size": 4, "lr": 0.01, "inner_clip": 0.5,
}  # fmt: skip
DATA = {"corruption": {"window": 16, "kinds": ["shuffled", "repeated"]}}
RUN = {
    "budget": {"steps": 8}, "batch_size": 4, "eval_every": 4, "eval_batches": 1, "checkpoint_every": 1,
    "keep_checkpoints": 9, "sampling": {"tokens": 0}, "log_every": 1,
}  # fmt: skip


def rater_recipe(learner: dict[str, Any] | None = None, run: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    model = {"layers": 1, "heads": 1, "width": 8, "context": 16} | sections.pop("model", {})
    return tiny_recipe(learner=LEARNER | (learner or {}), data=DATA, model=model, run=RUN | (run or {}), **sections)


def user_recipe(rating: dict[str, Any], **sections: Any) -> Recipe:
    """A run of two steps that is rated by this."""
    model = {"layers": 1, "heads": 1, "width": 8, "context": 16} | sections.pop("model", {})
    run = RUN | {"budget": {"steps": 2}}
    return tiny_recipe(rating={"name": "data_rater"} | rating, data=DATA, model=model, run=run, **sections)
