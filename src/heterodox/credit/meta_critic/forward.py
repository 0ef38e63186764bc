"""Phase A's first half: the main forward pass without a graph, and the readout's exact local gradient."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from heterodox.core.comm import Comm
from heterodox.core.errors import RecipeError
from heterodox.core.memory import hold
from heterodox.core.protocols import Objective, PerToken
from heterodox.core.types import Batch
from heterodox.credit.meta_critic.networks import EMBEDDINGS, Network
from heterodox.credit.tape import RandomState, Tape, draws, random_state, record_layers, replayed
from heterodox.model import GPT


@dataclass
class Forward:
    """One forward pass: each stage's input and output, the tape, the readout's gradients, the error at h_N.

    `inputs` and `outputs` are by stage; the embeddings' input is the tokens. `before` holds the random state ahead of
    each stage if the model draws dropout masks, else nothing.
    """

    batch: Batch
    weights: Float[Tensor, " batch"]
    tape: Tape
    inputs: dict[int, Tensor]
    outputs: dict[int, Float[Tensor, "batch time width"]]
    before: dict[int, RandomState]
    logits: Float[Tensor, "batch time vocab"]
    losses: Float[Tensor, " batch"]
    loss: Float[Tensor, ""]
    error: Float[Tensor, "batch time width"]
    readout_grads: dict[str, Tensor]

    @property
    def last(self) -> Float[Tensor, "batch time width"]:
        """h_N."""
        return self.outputs[max(self.outputs)]


def run_stage(model: GPT, index: int, x: Tensor) -> Float[Tensor, "batch time width"]:
    """The embeddings of tokens, or a block and the stream's bottleneck behind it."""
    return model.embed(x) if index == EMBEDDINGS else model.subspace(model.blocks[index](x))


def main_forward(
    model: GPT,
    batch: Batch,
    weights: Float[Tensor, " batch"],
    objective: Objective,
    operations: tuple[type[nn.Module], ...],
) -> Forward:
    """Run `model` on `batch`, keeping what critics and partial forwards need."""
    device = model.head.weight.device
    random = any(draws(module) for module in model.modules())
    inputs, outputs, before = {}, {}, {}
    with torch.no_grad(), record_layers(model, operations) as tape, model.autocast():
        x = batch.inputs
        for index in range(EMBEDDINGS, len(model.blocks)):
            if random:
                before[index] = random_state(device)
            inputs[index] = x
            x = outputs[index] = hold(run_stage(model, index, x))
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = model.readout(leaf.view_as(leaf))  # PyTorch's FLOP counter cannot follow a leaf into a module
        losses = objective.losses(logits, batch)
        loss = (losses * weights).mean()
        names = [name for name in sorted(model.readout_names) if model.get_parameter(name).requires_grad]
        error, *grads = torch.autograd.grad(loss, [leaf, *map(model.get_parameter, names)])
    return Forward(
        batch=batch,
        weights=weights,
        tape=tape,
        inputs=inputs,
        outputs=outputs,
        before=before,
        logits=logits.detach(),
        losses=losses.detach(),
        loss=loss.detach(),
        error=error,
        readout_grads=dict(zip(names, grads, strict=True)),
    )


# The global target G_T = MLP_G(…) and its local copies LTF_i = M_i G_T.
#
#     pooled   G = MLP_G([h̄_N ‖ L]), one vector a step: the source's. It knows nothing of the labels but the loss.
#     token    G_t = MLP_G([h_N,t ‖ L_t])
#     error    G_t = MLP_G(h_N,t, ê_t) with a linear path,  ê_t = e_t / ρ_t,  ρ_t = rms(e_t),  e = B·T ∂L/∂h_N
#
# e is the error in hidden space, carried back through head and final norm alone. A true error at a layer is linear in
# it, so its size ρ_t is taken off the critics' inputs and put back onto their outputs; with the other targets that size
# is the example's weight. An error grows on its way down through norms as the stream gets shorter: at stage i the size
# is ρ_t spread(h_N) / spread(h_i). What MLP_G sees is detached; G is not.


TargetKind = Literal["pooled", "token", "error"]


@dataclass
class Sight:
    """What the networks are told: MLP_G's context and signal, and the size that goes onto every critic's output."""

    context: Float[Tensor, "#batch #time context"]
    signal: Float[Tensor, "batch time width"] | None
    size: Float[Tensor, "#batch #time 1"]


def normal(hidden: Float[Tensor, "*lead width"], dtype: torch.dtype) -> Float[Tensor, "*lead width"]:
    """Hidden states as networks see them: each of mean 0 and variance 1."""
    return F.layer_norm(hidden.to(dtype), hidden.shape[-1:])


def spread(hidden: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead 1"]:
    """The standard deviation of each hidden state's entries, which a norm divides by."""
    return (hidden.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


@torch.no_grad()
def look(kind: TargetKind, seen: Forward, objective: Objective, comm: Comm, dtype: torch.dtype) -> Sight:
    """What MLP_G sees of a forward pass. Pooled states and losses are means over all ranks."""
    weights = seen.weights.to(dtype)[:, None, None]
    if kind == "pooled":
        loss = seen.loss.to(dtype).view(1, 1, 1).clone()
        context = torch.cat([pool(normal(seen.last, dtype), weights, comm), loss], dim=-1)
        comm.mean_([loss])
        context[..., -1:] = loss
        return Sight(context, None, weights)
    hidden = normal(seen.last, dtype)
    if kind == "token":
        return Sight(torch.cat([hidden, token_losses(seen, objective).to(dtype)[..., None]], dim=-1), None, weights)
    error = seen.error.to(dtype) * seen.batch.num_tokens
    size = error.square().mean(-1, keepdim=True).sqrt()
    return Sight(hidden, error / size.clamp_min(torch.finfo(dtype).tiny), size)


def pool(
    hidden: Float[Tensor, "batch time width"], weights: Float[Tensor, "batch 1 1"], comm: Comm
) -> Float[Tensor, "1 1 width"]:
    """The mean over tokens, weighted by example, of all ranks."""
    mean = (hidden * weights).mean((0, 1), keepdim=True)
    comm.mean_([mean])
    return mean


def token_losses(seen: Forward, objective: Objective) -> Float[Tensor, "batch time"]:
    """The objective of every token where it is. Raises `RecipeError` for one that cannot tell."""
    if not isinstance(objective, PerToken):
        raise RecipeError(
            f"credit.target token needs the loss of every token, and objective {type(objective).__name__} has no "
            "token_losses; take target error or pooled"
        )
    return objective.token_losses(seen.logits, seen.batch)


def target_network(
    kind: TargetKind, width: int, hidden: int, outputs: int, generator: torch.Generator, like: Tensor
) -> Network:
    """MLP_G. That of `error` begins near the identity."""
    if kind != "error":
        return Network(
            width + 1, 0, hidden, outputs, form="mlp", linear=False, generator=generator, like=like, output_gain=1.0
        )
    return Network(
        width, width, hidden, outputs, form="gated", linear=True, generator=generator, like=like, identity=True
    )


def draw_projection(local: int, width: int, density: float, generator: torch.Generator) -> Float[Tensor, "local width"]:
    """M_i. Of density 1 it is orthogonal; else each row has that share of normal entries at random places.

    Rows have length 1 (for an orthogonal one with more rows than columns: on average), or LTF would vanish.
    """
    if density == 1:
        gain = math.sqrt(max(1.0, local / width))
        return nn.init.orthogonal_(torch.empty(local, width, dtype=torch.float64), gain, generator=generator)
    keep = max(1, round(density * width))
    places = torch.rand(local, width, generator=generator).topk(keep, dim=1).indices
    entries = F.normalize(torch.randn(local, keep, generator=generator), dim=1)
    return torch.zeros(local, width).scatter_(1, places, entries)


# Partial forwards: what the loss would be if one stage had other weights and all others the ones they have.
#
#     h_i' = Stage_i(h_{i−1}, W_i'),   h_j' = Stage_j(h_{j−1}', W_j),  j > i,   L_meta,i = Loss(Readout(h_N'), y)
#
# or if it had its own weights and what comes out at its points were moved. h_j' stays attached (the source's protocol
# detaches it between stages, which would make every meta-gradient but the last stage's zero). W_j does not require a
# gradient meanwhile: autograd keeps nothing for it, and it never has a `.grad`. Several stages' partial forwards share
# the stages above them: their streams run through those as one larger batch, each from where it begins. Under dropout
# each runs alone instead, with the masks of the main forward.


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
