"""A recipe's rule by itself: one signal in float64, on a batch that is not learned from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.conformance.tiny import tiny_batch
from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.core.protocols import Credit, LanguageModel
from heterodox.core.types import Batch, Signal
from heterodox.objective import CrossEntropy
from heterodox.recipe import Recipe, check, merge
from heterodox.run.session import build_learner, build_model

SYMBOLS = 8
ALONE = {"objective": "cross_entropy", "rating": "uniform", "update": "sgd", "learner": "gradient"}


def changed(recipe: Recipe, **sections: Any) -> Recipe:
    """`recipe` with `sections` over it."""
    return check(merge(recipe.dump(), sections))


def shortened(recipe: Recipe, steps: int, **run: Any) -> Recipe:
    """`recipe` for so many steps, or at its own length where a part refuses to run for so few; `run` over it."""
    try:
        return changed(recipe, run={"budget": {"steps": steps}} | run)
    except RecipeError:
        return changed(recipe, run=run)


@dataclass
class OneSignal:
    """A rule, the model that it was built for, a batch, and a weight for each of its examples."""

    model: LanguageModel
    rule: Credit
    batch: Batch
    weights: Float[Tensor, " batch"]

    def take(self, batch: Batch | None = None, weights: Float[Tensor, " batch"] | None = None) -> Signal:
        """The rule's signal for the cross-entropy."""
        given = self.weights if weights is None else weights
        return self.rule.signal(self.model, batch or self.batch, given, CrossEntropy())

    @property
    def manifest(self) -> Mapping[str, str]:
        return self.rule.manifest(self.model)


def one_signal(recipe: Recipe, **sections: Any) -> OneSignal:
    """The recipe's rule on the recipe's model, everything else at its plainest, in float64."""
    alone = changed(recipe, **ALONE, run={"precision": "float64"}, **sections)
    model = build_model(alone, SYMBOLS, "cpu")
    rule = build_learner(alone, model, Solo()).credit
    batch = tiny_batch(4, alone.model.context, SYMBOLS)
    return OneSignal(model, rule, batch, torch.ones(4, dtype=torch.float64))
