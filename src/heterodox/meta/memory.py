"""What going back through a window holds, told by a window of as few steps as have their graph kept at a time."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heterodox.core.held import measure_held_bytes
from heterodox.core.types import Batch
from heterodox.meta.cost import stored_bytes
from heterodox.meta.gradient import meta_gradient
from heterodox.meta.options import MetaOptions
from heterodox.meta.problem import Losses, has_dropout
from heterodox.meta.rater import Rater
from heterodox.meta.steps import InnerState, InnerUpdate

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
