"""What steps of the gradient learner will cost, told without taking them; works on fake tensors."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.comm import Solo
from heterodox.core.memory import activation_bytes
from heterodox.core.protocols import (
    Costly,
    Credit,
    EvolvingObjective,
    Foretold,
    LanguageModel,
    Objective,
    Preparing,
    Rating,
    Selecting,
    StructuralUpdate,
    Uneven,
    Update,
)
from heterodox.core.state import split
from heterodox.core.types import Batch, Cost, Diagnosis
from heterodox.learner.probe import ModelWindow

# What a rating makes of a batch, whatever kind of rating it is.


def rate_examples(rating: Rating, batch: Batch) -> tuple[Batch, Float[Tensor, " kept"]]:
    """What of `batch` is learned from, and how much each example counts."""
    if isinstance(rating, Selecting):
        batch = rating.select(batch)
    return batch, rating.weights(batch)


def unrated(rating: Rating, batch: Batch) -> tuple[Batch, Float[Tensor, " kept"]]:
    """As many examples of `batch` as are learned from, each with weight 1, without asking the rating."""
    if isinstance(rating, Selecting):
        size = rating.kept(len(batch.ids))
        batch = Batch(batch.inputs[:size], batch.targets[:size], batch.ids[:size])
    return batch, torch.ones(batch.ids.shape, device=batch.inputs.device)


def rating_cost(rating: Rating, drawn: Batch) -> Cost:
    """What rating the examples that were drawn costs."""
    return rating.cost(drawn) if isinstance(rating, Costly) else Cost()


def upfront(rating: Rating) -> Cost:
    """What it does once, before the first step."""
    return rating.upfront() if isinstance(rating, Preparing) else Cost()


def rating_held_bytes(rating: Rating, batch: Batch) -> int:
    """What it holds in doing so."""
    return rating.held_bytes(batch) if isinstance(rating, Preparing) else 0


def rating_diagnosis(rating: Rating) -> Diagnosis:
    """What went wrong in that."""
    return rating.diagnose() if isinstance(rating, Preparing) else Diagnosis()


def prepare(rating: Rating) -> bool:
    """Do a piece of what comes before the first step; return whether there is more."""
    return rating.prepare() if isinstance(rating, Preparing) else False


def prepared_whole(rating: Rating) -> bool:
    """Return whether this is a good moment for a checkpoint of that."""
    return rating.prepared_whole if isinstance(rating, Preparing) else True


def foretell(
    model: LanguageModel, objective: Objective, rating: Rating, credit: Credit, update: Update, drawn: Batch
) -> Foretold:
    """The cost of a step on such a batch, as drawn. Changes all of these parts."""
    parameters = dict(model.named_parameters())
    rule_state = _bytes(credit.state())
    batch, weights = unrated(rating, drawn)
    held = max(activation_bytes(model, batch, weights, objective, credit), rating_held_bytes(rating, drawn))
    signal = credit.signal(model, batch, weights, objective)
    learns = [name for name, origin in credit.manifest(model).items() if origin != "frozen"]
    late = {name: torch.zeros_like(parameters[name]) for name in learns if name not in signal.grads}
    grads = signal.grads | late  # some rules only begin to move a parameter after some steps
    if isinstance(update, StructuralUpdate):
        update.still = True  # what an event decides depends on numbers, and here are none
    update.apply(parameters | signal.own_parameters, grads | signal.own_grads, 1.0)
    beside_state = update.rehearse() if isinstance(update, StructuralUpdate) else 0
    sizes = {
        "weights": _bytes(dict(model.state_dict())),
        "signal": _bytes(grads),
        "update_state": _bytes(update.state()) + beside_state,
        "rule_state": rule_state,
        **({"objective_state": _bytes(objective.state())} if isinstance(objective, EvolvingObjective) else {}),
        "activations": held,
        "loss_gradient": 2 * 4 * batch.targets.numel() * model.head.weight.shape[0],  # of logits and their logarithms
    }
    beside = rating_cost(rating, drawn)
    event = _event(model, credit, update, batch)

    def later(step: int) -> Cost:
        of_signal = signal.cost
        if isinstance(credit, Uneven):
            of_signal = replace(of_signal, flops=credit.step_flops(model, batch, step))
        if isinstance(objective, EvolvingObjective):
            of_signal += objective.step_cost(batch, step)
        searches = isinstance(update, StructuralUpdate) and update.changes(step)
        return of_signal + beside + (event if searches else Cost())

    trained = sum(g.numel() for g in grads.values())
    return Foretold(signal.cost + beside, sizes, trained, upfront(rating), later)


def _event(model: LanguageModel, credit: Credit, update: Update, like: Batch) -> Cost:
    """What the update's look through its window costs, whenever it changes the structure."""
    if not isinstance(update, StructuralUpdate):
        return Cost()
    window = ModelWindow(model, credit, Solo())
    for examples, with_signal in update.passes:
        inputs, targets = (tokens[:1].repeat(examples, 1) for tokens in (like.inputs, like.targets))
        look = window.signal if with_signal else window.losses
        look(Batch(inputs, targets, like.ids[:1].repeat(examples)), {})
    return window.cost


def _bytes(tree: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in split(tree)[0].values())
