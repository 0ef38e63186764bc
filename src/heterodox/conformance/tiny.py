"""A recipe, a model and a batch small enough to check a rule in seconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.app.recipe import Recipe, check, merge
from heterodox.app.session import build_learner, build_model
from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.core.protocols import Credit, LanguageModel
from heterodox.core.rng import Streams
from heterodox.core.types import Batch, Signal
from heterodox.model import GPT
from heterodox.objective import CrossEntropy

CORPUS = {"name": "grammar", "symbols": 8, "order": 1, "concentration": 0.2, "length": 20_000}
BASE: dict[str, Any] = {
    "name": "tiny",
    "data": {"corpus": CORPUS, "tokenizer": {"name": "char"}},
    "model": {"name": "gpt", "layers": 2, "heads": 2, "width": 16, "context": 16},
    "run": {
        "budget": {"steps": 30},
        "batch_size": 8,
        "eval_every": 10,
        "eval_batches": 4,
        "checkpoint_every": 10,
        "log_every": 5,
        "sampling": {"tokens": 8},
        "device": "cpu",
        "threads": 1,
    },
}


def tiny_recipe(**sections: Any) -> Recipe:
    """A GPT of two blocks on a first-order Markov chain, 30 steps; `sections` are laid over it."""
    return check(merge(BASE, sections))


def tiny_gpt(dtype: torch.dtype = torch.float64, **options: Any) -> GPT:
    """A GPT with weights ten times as large as at initialisation, so that no layer is nearly linear."""
    options = {"layers": 2, "heads": 2, "width": 8, "context": 6, "bias": True} | options
    model = GPT.Config.model_validate(options).build(11, Streams(0)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1).add_(
                0.1 * torch.randn(parameter.shape, generator=Streams(1).generator("init"), dtype=dtype)
            )
    return model


def tiny_batch(batch: int = 4, context: int = 6, vocab: int = 11, seed: int = 0) -> Batch:
    """Windows of random tokens."""
    tokens = torch.randint(vocab, (batch, context + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(batch))


# A recipe's rule by itself: one signal in float64, on a batch that is not learned from.


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
