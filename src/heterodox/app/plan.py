"""What a recipe would cost, without training: parameters, memory by part, FLOPs and tokens.

The model is made of fake tensors: no weight is allocated, and a step is traced rather than computed, with the kernels
that a CPU would choose.
"""

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from heterodox.app import catalog
from heterodox.app.recipe import Recipe
from heterodox.app.session import build_learner, build_model
from heterodox.core.comm import Solo
from heterodox.core.errors import HeterodoxError, RecipeError
from heterodox.core.protocols import Foretold, Stateless
from heterodox.core.types import Batch, Cost
from heterodox.data import Windows
from heterodox.training.config import Budget

HORIZON = 100_000
"""So many steps are looked at one by one, for a rule's may differ in cost; later ones cost what these do on average."""


def plan(recipe: Recipe, speed: float | None = None) -> dict[str, Any]:
    """Parameters, bytes by part, FLOPs and tokens per step, once before the first step, and in all; plain data.

    FLOPs per step are a mean over the run. Reads the corpus (its size and vocabulary matter), trains nothing, and fits
    any width into little memory. With a `speed` in FLOPs per second there are hours, too, and a budget in seconds has a
    number of steps; a run's `summary.json` says what a machine reaches. Raises `RecipeError` for a speed of no use.
    """
    if speed is not None and not 0 < speed < math.inf:
        raise RecipeError(f"--speed: found {speed:g}, expected FLOPs per second, finite and above 0")
    dataset = recipe.data.build()
    with FakeTensorMode():
        model = build_model(recipe, dataset.tokenizer.vocab_size, "cpu")

        def blank(
            split: str,
            batch_size: int,
            order: str | int = 0,
            *,
            whole: bool = False,
            without: Int[Tensor, " ids"] | None = None,
        ) -> _Blank:
            count = Windows(dataset.splits[split], recipe.model.context).count
            return _Blank(batch_size, recipe.model.context, count - (0 if without is None else len(without)))

        drawn = blank("train", recipe.rating.drawn(recipe.run.batch_size)).next_batch()
        try:
            learner = build_learner(recipe, model, Solo(), blank)
            foretold = learner.foretell(drawn)
        except HeterodoxError:
            raise
        except Exception as error:
            outside = [
                f"{slot} {name}" for slot, name in recipe.chosen().items() if catalog.SLOTS[slot].is_plugin(name)
            ]
            if not outside:  # ours: a bug
                raise
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise RecipeError(
                f"{' and '.join(outside)} cannot be planned: a plan traces a step on fake tensors, which have shapes "
                f"and no numbers, and there it fails ({reason}); do not read values out of tensors in a step"
            ) from error
    cost, once, sizes, budget = foretold.cost, foretold.once, foretold.memory_bytes, recipe.run.budget
    if budget.seconds is not None and speed is not None:
        budget = Budget(flops=budget.seconds * speed)
    steps, counted, spent = _count(budget, foretold)
    flops = None if steps is None else once.flops + steps * spent.flops // counted
    tokens = None if steps is None else once.tokens + steps * cost.tokens
    there = Windows(dataset.splits["train"], recipe.model.context).count * recipe.model.context
    return {
        "recipe": recipe.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": foretold.trained_parameters,
        "active_parameters": sum(p.numel() for p in model.parameters()) - learner.num_masked,
        "memory_bytes": sizes | {"total": sum(sizes.values())},
        "per_step": {"tokens": cost.tokens} | {key: getattr(spent, key) // counted for key in ("meta_tokens", "flops")},
        "once": {"tokens": once.tokens, "meta_tokens": once.meta_tokens, "flops": once.flops},
        "steps": steps,
        "tokens": tokens,
        "meta_tokens": None if steps is None else once.meta_tokens + steps * spent.meta_tokens // counted,
        "flops": flops,
        "hours": None if flops is None or speed is None else flops / speed / 3600,
        "seconds": recipe.run.budget.seconds,
        "epochs": None if tokens is None else tokens / max(there, 1),
        "in_float32": recipe.in_float32(),
        "corpus": dataset.describe(),
    }


def _count(budget: Budget, foretold: Foretold) -> tuple[int | None, int, Cost]:
    """The steps of the budget (None: nobody knows), of these how many were looked at, and their cost together."""
    cost, once = foretold.cost, foretold.once
    steps: int | None = None
    if budget.unit == "steps":
        steps = budget.steps
    elif budget.unit == "tokens":
        paid = once.tokens + once.meta_tokens
        steps = max(1, math.ceil((budget.limit - paid) / (cost.tokens + cost.meta_tokens)))
    left = budget.limit - once.flops
    spent, counted = Cost(), 0
    while counted < min(steps or HORIZON, HORIZON):
        spent += foretold.of(counted)
        counted += 1
        if budget.unit == "flops" and spent.flops >= left:
            return counted, counted, spent
    if budget.unit == "flops":
        steps = math.ceil(left * counted / spent.flops)
    return steps, counted, spent


class _Blank(Stateless):
    """Batches of the right shape, traced rather than read, of a split of so many examples."""

    def __init__(self, batch_size: int, context: int, examples: int) -> None:
        self._shape = batch_size, context
        self.examples_per_epoch = examples

    def next_batch(self) -> Batch:
        tokens = torch.zeros(self._shape, dtype=torch.long)
        return Batch(tokens, tokens.clone(), torch.zeros(len(tokens), dtype=torch.long))
