"""What a recipe would cost, without training: parameters, memory by part, FLOPs and tokens.

The model is made of fake tensors: no weight is allocated, and a step is traced rather than computed, with the kernels
that a CPU would choose.
"""

import math
import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from heterodox.core.comm import Solo
from heterodox.core.protocols import Stateless
from heterodox.core.types import Batch
from heterodox.recipe import Recipe
from heterodox.run.session import build_learner, build_model


def plan(recipe: Recipe) -> dict[str, Any]:
    """Parameters, bytes by part, FLOPs and tokens per step and in all; plain data.

    Reads the corpus (its size and vocabulary matter), trains nothing, and fits any width into little memory.
    """
    dataset = recipe.data.build()
    with FakeTensorMode():
        model = build_model(recipe, dataset.tokenizer.vocab_size, "cpu")

        def blank(split: str, batch_size: int, order: str | int = 0, *, whole: bool = False) -> _Blank:
            return _Blank(batch_size, recipe.model.context)

        learner = build_learner(recipe, model, Solo(), blank)
        foretold = learner.foretell(blank("train", recipe.rating.drawn(recipe.run.batch_size)).next_batch())
    cost, sizes, budget = foretold.cost, foretold.memory_bytes, recipe.run.budget
    per_step = {
        "steps": 1.0,
        "tokens": cost.tokens + cost.meta_tokens,
        "flops": cost.flops,
        "seconds": math.inf,
    }[budget.unit]
    steps = math.ceil(budget.limit / per_step) if math.isfinite(per_step) else None
    windows = (len(dataset.splits["train"].tokens) - 1) // recipe.model.context
    return {
        "recipe": recipe.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": foretold.trained_parameters,
        "active_parameters": sum(p.numel() for p in model.parameters()) - learner.num_masked,
        "memory_bytes": sizes | {"total": sum(sizes.values())},
        "per_step": {"tokens": cost.tokens, "meta_tokens": cost.meta_tokens, "flops": cost.flops},
        "steps": steps,
        "tokens": None if steps is None else steps * cost.tokens,
        "meta_tokens": None if steps is None else steps * cost.meta_tokens,
        "flops": None if steps is None else steps * cost.flops,
        "seconds": budget.seconds,
        "epochs": None if steps is None else steps * recipe.run.batch_size / max(windows, 1),
        "corpus": dataset.describe(),
    }


class _Blank(Stateless):
    """Batches of the right shape, traced rather than read; there are always enough of them."""

    examples_per_epoch = sys.maxsize

    def __init__(self, batch_size: int, context: int) -> None:
        self._shape = batch_size, context

    def next_batch(self) -> Batch:
        tokens = torch.zeros(self._shape, dtype=torch.long)
        return Batch(tokens, tokens.clone(), torch.zeros(len(tokens), dtype=torch.long))
