"""Partial forwards: what the loss would be if one stage had other weights and all others the ones they have.

    h_i' = Stage_i(h_{i−1}, W_i'),   h_j' = Stage_j(h_{j−1}', W_j),  j > i,   L_meta,i = Loss(Readout(h_N'), y)

or if it had its own weights and what comes out at its points were moved.
h_j' stays attached (the source's protocol detaches it between stages, which would make every meta-gradient but the last
stage's zero). W_j does not require a gradient meanwhile: autograd keeps nothing for it, and it never has a `.grad`.
Several stages' partial forwards share the stages above them: their streams run through those as one larger batch, each
from where it begins. Under dropout each runs alone instead, with the masks of the main forward.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from heterodox.core.protocols import Objective
from heterodox.credit.meta_critic.forward import Forward, run_stage
from heterodox.credit.operation import replayed
from heterodox.model import GPT

Weights = Mapping[str, Tensor]
Moves = Mapping[str, Float[Tensor, "batch time width"]]
"""By slot what is added to what comes out there."""
Run = Callable[[int, Tensor, Weights], Tensor]
"""Runs a stage on a stream, with some of its weights replaced."""


class _Stages(nn.Module):
    """A stage of the model as a module's forward pass, as `functional_call` wants it."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, index: int, x: Tensor) -> Tensor:
        return run_stage(self.model, index, x)


@contextmanager
def fixed_weights(model: nn.Module) -> Iterator[None]:
    """Within the context, no parameter of `model` requires a gradient."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def partial_losses(
    model: GPT,
    seen: Forward,
    objective: Objective,
    hypotheses: Mapping[int, Weights],
    moves: Mapping[int, Moves] | None = None,
) -> dict[int, Float[Tensor, " batch"]]:
    """Each hypothesis's losses by example, differentiable in it: weights by stage, and `moves` by stage."""
    run = _runner(model, seen)
    streams: dict[int, Tensor] = {}
    with fixed_weights(model):
        with model.autocast():
            for index in sorted(seen.inputs):
                streams = _onwards(index, streams, run, alone=bool(seen.before))
                if index in hypotheses:
                    with _moved(model, seen, (moves or {}).get(index, {})):
                        streams[index] = run(index, seen.inputs[index], hypotheses[index])
        logits = model.readout(torch.cat(list(streams.values()))).chunk(len(streams))
    return {index: objective.losses(part, seen.batch) for index, part in zip(streams, logits, strict=True)}


@torch.no_grad()
def joint_losses(model: GPT, seen: Forward, objective: Objective, weights: Weights) -> Float[Tensor, " batch"]:
    """The losses by example with all of these weights at once."""
    run, x = _runner(model, seen), seen.batch.inputs
    with model.autocast():
        for index in sorted(seen.inputs):
            x = run(index, x, weights)
    return objective.losses(model.readout(x), seen.batch)


@contextmanager
def _moved(model: GPT, seen: Forward, moves: Moves) -> Iterator[None]:
    """Within the context, each move is added to the output of the module at whose end its slot is."""
    ends = {record.point: record.point_end for record in seen.tape.records}
    handles = [
        model.get_submodule(ends[slot]).register_forward_hook(lambda module, args, out, move=move: out + move)
        for slot, move in moves.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _runner(model: GPT, seen: Forward) -> Run:
    """Runs stages under the main forward's own dropout masks."""
    stages = _Stages(model)

    def run(index: int, x: Tensor, weights: Weights) -> Tensor:
        named = {f"model.{name}": weight for name, weight in weights.items()}
        with replayed(seen.before[index], x.device) if seen.before else nullcontext():
            return functional_call(stages, named, (index, x), tie_weights=False)

    return run


def _onwards(index: int, streams: dict[int, Tensor], run: Run, *, alone: bool) -> dict[int, Tensor]:
    """All streams one stage further, together or each alone."""
    if not streams:
        return streams
    if alone:
        return {start: run(index, x, {}) for start, x in streams.items()}
    joined = run(index, torch.cat(list(streams.values())), {})
    return dict(zip(streams, joined.chunk(len(streams)), strict=True))
