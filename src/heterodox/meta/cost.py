"""What meta-training consumes. A Hessian-vector product takes nine forward passes' worth of matrix products.

Forward 1, the gradient 2 (neither anew where the step's graph was kept), and backwards through both of these 6: for
y = Wx those are the derivatives of y, of Wᵀδ and of δxᵀ in each of their two factors.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heterodox.core.memory import measure_held_bytes
from heterodox.core.protocols import LanguageModel
from heterodox.core.types import Batch, Cost
from heterodox.meta.gradient import meta_gradient, moves, recorded
from heterodox.meta.options import MetaOptions
from heterodox.meta.problem import Losses, has_dropout
from heterodox.meta.rater import Rater
from heterodox.meta.steps import InnerState, InnerUpdate

CURVATURE = 9


def scoring_flops(rater: Rater, batch: Batch) -> int:
    """Of one forward pass of the rater."""
    return rater.forward_flops(*batch.inputs.shape).total


def step_cost(options: MetaOptions, model: LanguageModel, rater: Rater, members: int) -> Cost:
    """Of a step of so many inner models that is not differentiated."""
    size, context = options.batch_size, model.context
    flops = model.forward_flops(size, context).with_backward + _weighing(options, rater, size, context)
    return Cost(tokens=members * size * context, flops=members * flops)


def round_cost(options: MetaOptions, model: LanguageModel, rater: Rater, members: int) -> Cost:
    """Of the window of so many inner models, and the rater's step. Steps taken again cost FLOPs, but no tokens."""
    size, context, window = options.batch_size, model.context, options.backprop_steps
    plan = list(moves(options.schedule, window, options.slots))
    inner = model.forward_flops(size, context)
    pieces = size > (options.micro_batch or size)
    kept = 0 if options.micro_batch else len(recorded(plan, options.graphs))
    advances = sum(move == "advance" for move, _ in plan)
    flops = (advances + window * pieces - kept) * inner.with_backward + window * CURVATURE * inner.total
    flops += window * _weighing(options, rater, size, context)
    scoring = rater.forward_flops(size, context)
    if options.control == "detached":  # weights are computed again for the way back, which leads nowhere
        flops += window * scoring.total
    elif options.asks:
        flops += window * scoring.with_backward
    flops += ((options.control == "auxiliary") + bool(options.weighting.entropy)) * scoring.with_backward
    validation = model.forward_flops(options.val_batch_size, context).with_backward
    flops += options.val_batches * validation
    tokens = context * members
    return Cost(
        tokens=tokens * size * window,
        meta_tokens=tokens * options.val_batches * options.val_batch_size,
        flops=members * flops,
    )


def training_cost(options: MetaOptions, rounds: int, model: LanguageModel, rater: Rater, members: int) -> Cost:
    """Of so many rounds from their beginning to their end, of so many inner models."""
    total = Cost()
    plain, window = step_cost(options, model, rater, members), round_cost(options, model, rater, members)
    for _ in range(rounds):
        total += window
        for _ in range(options.inner_steps - options.backprop_steps):
            total += plain
    return total


def _weighing(options: MetaOptions, rater: Rater, size: int, context: int) -> int:
    if options.control in ("constant", "auxiliary"):
        return 0
    return rater.forward_flops(size, context).total


def stored_bytes(options: MetaOptions, state: torch.Tensor, num_vectors: int) -> int:
    """Of the states that a window stores at a time."""
    now = most = 0
    for move, _ in moves(options.schedule, options.backprop_steps, options.slots):
        now += (move == "store") - (move == "drop")
        most = max(most, now)
    return most * num_vectors * state.nbytes


# What going back through a window holds, told by a window of as few steps as have their graph kept at a time.


Weighing = Callable[[Batch], Float[Tensor, " batch"]]


def window_bytes(
    options: MetaOptions, model: nn.Module, losses: Losses, rater: Rater, weigh: Weighing, update: InnerUpdate,
    start: InnerState, like: Batch,
) -> int:  # fmt: skip
    """The most bytes held at a time on the way through a window of one inner model and back, and for its states.

    Batches have the options' sizes and `like`'s first example throughout. Leaves `model` with other weights; works on
    fake tensors.
    """
    parameters = list(rater.parameters())
    lasting = [*model.parameters(), *model.buffers(), *parameters, *rater.buffers(), start.weights, *start.moments]
    with measure_held_bytes(lasting) as held:
        meta_gradient(
            model,
            losses,
            [_repeated(like, options.batch_size)] * max(1, options.graphs),
            weigh,
            [_repeated(like, options.val_batch_size)],
            update,
            parameters=parameters if options.asks else [],
            start=start,
            clip_norm=options.inner_clip,
            graphs=options.graphs,
            micro_batch=options.micro_batch,
            seed=0 if has_dropout(model) else None,
            check=False,
        )
    return held.peak + stored_bytes(options, start.weights, 1 + len(start.moments))


def _repeated(batch: Batch, size: int) -> Batch:
    inputs, targets = (tokens[:1].repeat(size, 1) for tokens in (batch.inputs, batch.targets))
    return Batch(inputs, targets, torch.arange(size, device=inputs.device))
