"""What critics speak for: stages of the model (the embeddings, then each block), their parameters and their slots.

A slot is a place where a critic puts its numbers. For `outer` it is a point at which an error enters (see `tape.py`),
as wide as what comes out there; for the other structures it is a parameter.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from heterodox.core.rng import Streams
from heterodox.credit.tape import Record, Tape, record_layers
from heterodox.model import GPT

EMBEDDINGS = -1
"""The stage below the first block."""


@dataclass
class Stage:
    """One stage: the shapes of the parameters that learn in it, by name, and the widths of its slots.

    `on_stream` are the slots whose layers write to the residual stream.
    """

    index: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    on_stream: set[str] = field(default_factory=set)

    @property
    def key(self) -> str:
        """How it is called in metrics and states."""
        return "embeddings" if self.index == EMBEDDINGS else f"block_{self.index}"


def stage_of(name: str) -> int:
    """The stage that a layer or parameter of this name belongs to."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else EMBEDDINGS


def critic_of(slot: str, *, shared: bool) -> str:
    """The critic that fills a slot: its stage's, or, if shared, that of all attentions or of all MLPs."""
    if stage_of(slot) == EMBEDDINGS:
        return "embeddings"
    if not shared:
        return f"block_{stage_of(slot)}"
    return "attention" if slot.split(".")[2].startswith(("ln1", "attn")) else "mlp"


def chosen(model: GPT, matrices: Iterable[str] | None, embeddings: bool) -> Callable[[Record], bool]:
    """Whether a layer of the tape learns here: all of a block's, or those whose names end as in `matrices`."""
    endings = None if matrices is None else {f".{ending}" for ending in matrices}

    def learns(record: Record) -> bool:
        if not record.learns:
            return False
        if f"{record.name}.weight" in model.embedding_names:
            return embeddings
        return record.name.startswith("blocks.") and (endings is None or any(map(record.name.endswith, endings)))

    return learns


@torch.no_grad()
def stages_of(
    model: GPT,
    operations: tuple[type[nn.Module], ...],
    learns: Callable[[Record], bool],
    num_outputs: Callable[[tuple[int, ...]], int] | None,
) -> list[Stage]:
    """The stages that learn, from a forward pass over one token. `num_outputs` of a shape; None: slots are points."""
    stages: dict[int, Stage] = {}
    with record_layers(model, operations) as tape:
        model.features(torch.zeros((1, 1), dtype=torch.long, device=model.head.weight.device))
    for record in filter(learns, tape.records):
        stage = stages.setdefault(stage_of(record.name), Stage(stage_of(record.name)))
        for name, parameter in record.layer.named_parameters():
            if parameter.requires_grad:
                stage.shapes[f"{record.name}.{name}"] = tuple(parameter.shape)
                if num_outputs is not None:
                    stage.slots[f"{record.name}.{name}"] = num_outputs(tuple(parameter.shape))
        if num_outputs is None:
            stage.slots[record.point] = record.point_width
            if record.name in model.stream_writers:
                stage.on_stream.add(record.point)
    return [stages[index] for index in sorted(stages)]


# SparseMask: the units of largest score are kept, the others 0; backwards the kept ones pass, the others do not.
#
# The straight-through estimator of the source is that derivative: the choice of units is taken for a constant.


def units_kept(density: float, units: int) -> int:
    """How many of `units` a density keeps: rounded down, so 0 where not one is due."""
    return int(density * units + 1e-9)


@torch.no_grad()
def largest(scores: Float[Tensor, "*lead units"], keep: int) -> Bool[Tensor, "*lead units"]:
    """True for the `keep` largest scores along the last dimension; exactly so many, ties broken by place."""
    index = scores.topk(keep, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)


# The small networks of the rule: MLP_G and the critics.
#
#     mlp     y = ρ (A s + O φ(U c + V s + b))
#     gated   y = ρ (A s + O (φ(U c + b) ⊙ V s))        φ = GELU
#
# c is the context (what a layer knows of itself), s the signal (what it is told), ρ the signal's size. `mlp` with no A
# is the source's two-layer critic on [c ‖ s]. A true error is linear in the output error, with a matrix that depends on
# the activations: `gated` has just that form, and with h hidden units it contains the backward pass of an MLP of h
# units.


Form = Literal["gated", "mlp"]


class Network(nn.Module):
    """One of the forms above, of the dtype and on the device of `like`. `signal` 0 leaves y = ρ O φ(U c + b)."""

    def __init__(
        self,
        context: int,
        signal: int,
        hidden: int,
        outputs: int,
        *,
        form: Form,
        linear: bool,
        generator: torch.Generator,
        like: Tensor,
        output_gain: float = 0.1,
        identity: bool = False,
    ) -> None:
        super().__init__()

        def matrix(fan_out: int, fan_in: int, gain: float = 1.0) -> nn.Parameter:
            drawn = torch.randn(fan_out, fan_in, generator=generator) * (gain / math.sqrt(fan_in))
            return nn.Parameter(drawn.to(like))

        self.form: Form = form
        self.context = matrix(hidden, context)
        self.bias = nn.Parameter(torch.zeros(hidden).to(like))
        self.signal = matrix(hidden, signal) if signal else None
        self.output = matrix(outputs, hidden, output_gain)
        self.linear = matrix(outputs, signal, output_gain) if linear and signal else None
        if identity and self.linear is not None:
            nn.init.eye_(self.linear)

    def forward(
        self,
        context: Float[Tensor, "*#lead context"],
        signal: Float[Tensor, "*#lead signal"] | None = None,
        size: Float[Tensor, "*#lead 1"] | None = None,
        *,
        mean: bool = False,
    ) -> Tensor:
        """y for each token, or, with `mean`, its mean over all tokens, for which the output layer runs but once."""
        inner = F.linear(context, self.context, self.bias)
        if self.signal is None or signal is None:
            inner = F.gelu(inner)
        elif self.form == "gated":
            inner = F.gelu(inner) * F.linear(signal, self.signal)
        else:
            inner = F.gelu(inner + F.linear(signal, self.signal))
        if size is not None:
            inner = inner * size
        y = F.linear(_mean(inner) if mean else inner, self.output)
        if self.linear is None or signal is None:
            return y
        sized = signal if size is None else signal * size
        return y + F.linear(_mean(sized) if mean else sized, self.linear)

    def macs(self, rows: "Rows") -> int:
        """Multiply–adds of a call."""
        return sum(count * matrix.numel() for count, matrix in self._products(rows))

    def backward_macs(self, rows: "Rows", *, context: bool, signal: bool) -> int:
        """Multiply–adds of the way back to the matrices and, where they learn, to context and signal."""
        entering = [(context, self.context)] + [(signal, matrix) for matrix in (self.signal, self.linear)]
        passed = {id(matrix) for through, matrix in entering if not through}
        return sum((1 if id(matrix) in passed else 2) * n * matrix.numel() for n, matrix in self._products(rows))

    def _products(self, rows: "Rows") -> Iterator[tuple[int, Tensor]]:
        yield rows.contexts, self.context
        yield rows.outputs, self.output
        if self.signal is not None:
            yield rows.signals, self.signal
        if self.linear is not None:
            yield rows.linear, self.linear


class Rows(NamedTuple):
    """How many rows pass each matrix of a network in a call."""

    contexts: int
    signals: int
    outputs: int
    linear: int


def _mean(x: Float[Tensor, "*lead width"]) -> Float[Tensor, " width"]:
    return x.flatten(0, -2).mean(0)


# How numbers that a critic puts out become a matrix ΔW, and what its sparse mask keeps or drops.
#
#     elementwise   every entry of ΔW is an output           units: entries
#     low_rank      ΔW = Σ_r a_r b_rᵀ                          units: rank-one terms, by ‖a_r‖ ‖b_r‖
#     block         tiles of side s, each with a score: ΔW_tile = σ(score) · content
#                                                             units: tiles, by norm
#
# These are for outputs that are means over all tokens. `outer.py` has the fourth, whose outputs are per token. Vectors
# (gains, biases) are elementwise and whole under each.


Shape = tuple[int, ...]


class Structure(ABC):
    """A form of ΔW. `density` is the share of units that the mask keeps."""

    def __init__(self, density: float = 1.0) -> None:
        self.density = density

    @abstractmethod
    def units(self, shape: Shape) -> int:
        """Among how many units of a matrix the mask chooses."""

    @abstractmethod
    def num_outputs(self, shape: Shape) -> int:
        """How many numbers describe a matrix."""

    @abstractmethod
    def matrix(self, outputs: Float[Tensor, " outputs"], shape: Shape) -> Float[Tensor, "fan_out fan_in"]:
        """ΔW, differentiable in the outputs."""

    @abstractmethod
    def regression_target(self, gradient: Tensor) -> Tensor:
        """What gradient regression asks for: the gradient, sparse where units are of the matrix itself."""

    def misfit(self, shape: Shape) -> str:
        """Why a matrix cannot have this form, but for its name; empty if it can."""
        units = self.units(shape)
        if units_kept(self.density, units):
            return ""
        return f"credit.density {self.density:g} keeps none of the {units} units of"

    def macs(self, shape: Shape) -> int:
        """Multiply–adds of `matrix`."""
        return 0

    def _keep(self, scores: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
        keep = units_kept(self.density, scores.shape[-1])
        return torch.ones_like(scores) if keep == scores.shape[-1] else largest(scores, keep).to(scores.dtype)


class Elementwise(Structure):
    """Every entry for itself."""

    def units(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def num_outputs(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def matrix(self, outputs: Tensor, shape: Shape) -> Tensor:
        return (outputs * self._keep(outputs.detach().abs())).view(shape)

    def regression_target(self, gradient: Tensor) -> Tensor:
        return gradient * self._keep(gradient.flatten().abs()).view_as(gradient)


class LowRank(Structure):
    """ΔW = A B with A of `rank` columns."""

    def __init__(self, rank: int, density: float = 1.0) -> None:
        super().__init__(density)
        self.rank = rank

    def misfit(self, shape: Shape) -> str:
        if self.rank > min(shape):
            return f"credit.rank is {self.rank}, above the rank {min(shape)} of"
        return super().misfit(shape)

    def units(self, shape: Shape) -> int:
        return self.rank

    def num_outputs(self, shape: Shape) -> int:
        return self.rank * sum(shape)

    def matrix(self, outputs: Tensor, shape: Shape) -> Tensor:
        left, right = outputs.split([self.rank * shape[0], self.rank * shape[1]])
        left, right = left.view(self.rank, shape[0]), right.view(self.rank, shape[1])
        keep = self._keep((left.norm(dim=1) * right.norm(dim=1)).detach())
        return (left * keep[:, None]).T @ right

    def regression_target(self, gradient: Tensor) -> Tensor:
        return gradient

    def macs(self, shape: Shape) -> int:
        return self.rank * shape[0] * shape[1]


class Block(Structure):
    """Square tiles, each with a score: ΔW_tile = σ(score) · content; kept are the tiles of largest norm."""

    def __init__(self, side: int, density: float = 1.0) -> None:
        super().__init__(density)
        self.side = side

    def misfit(self, shape: Shape) -> str:
        if any(size % self.side for size in shape):
            return f"credit.block is {self.side}, which does not divide"
        return super().misfit(shape)

    def units(self, shape: Shape) -> int:
        return (shape[0] // self.side) * (shape[1] // self.side)

    def num_outputs(self, shape: Shape) -> int:
        return shape[0] * shape[1] + self.units(shape)

    def matrix(self, outputs: Tensor, shape: Shape) -> Tensor:
        content, scores = outputs.split([shape[0] * shape[1], self.units(shape)])
        tiles = self._tiles(content.view(shape)) * scores.sigmoid()[:, None, None]
        keep = self._keep(tiles.detach().norm(dim=(1, 2)))
        return self._joined(tiles * keep[:, None, None], shape)

    def regression_target(self, gradient: Tensor) -> Tensor:
        tiles = self._tiles(gradient)
        return self._joined(tiles * self._keep(tiles.norm(dim=(1, 2)))[:, None, None], tuple(gradient.shape))

    def _tiles(self, matrix: Tensor) -> Float[Tensor, "tiles side side"]:
        s = self.side
        return matrix.unflatten(1, (-1, s)).unflatten(0, (-1, s)).transpose(1, 2).flatten(0, 1)

    def _joined(self, tiles: Tensor, shape: Shape) -> Tensor:
        s = self.side
        return tiles.unflatten(0, (shape[0] // s, shape[1] // s)).transpose(1, 2).reshape(shape)


# G on its way down along the attention of the blocks above.
#
#     r_i = ρ G + Σ_{j>i} Q_j A_jᵀ P_j ρ G
#
# An error at a token is also an error of the earlier tokens that it attended to, which a critic of single tokens cannot
# know. A_jᵀ carries it there: the derivative of block j's attention by its values, which depends on the attention
# weights of this very forward pass and on no weight matrix. P_j and Q_j, of the blocks above the lowest stage, are
# learned with MLP_G.


GAIN = 0.1


class Transport(nn.Module):
    """P_j and Q_j of each of `blocks`, for a G of `target_width` in a model of `width`."""

    def __init__(self, blocks: Iterable[int], width: int, target_width: int, streams: Streams, like: Tensor) -> None:
        super().__init__()
        self.blocks = sorted(blocks, reverse=True)
        self.inward, self.outward = nn.ParameterDict(), nn.ParameterDict()
        for block in self.blocks:
            generator = streams.generator("rule", "transport", block)
            inward = torch.randn(width, target_width, generator=generator) / math.sqrt(target_width)
            outward = torch.randn(target_width, width, generator=generator) * (GAIN / math.sqrt(width))
            self.inward[str(block)] = nn.Parameter(inward.to(like))
            self.outward[str(block)] = nn.Parameter(outward.to(like))

    def forward(
        self, tape: Tape, error: Float[Tensor, "batch time global"], lowest: int
    ) -> dict[int, Float[Tensor, "batch time global"]]:
        """r_i by stage, down to stage `lowest`, from ρ G."""
        values = {record.name: record for record in tape.records}
        found = {max(self.blocks): error}
        for block in self.passed(lowest):
            inward = nn.functional.linear(error, self.inward[str(block)])
            back = _to_values(values[f"blocks.{block}.attn.v"], inward)
            found[block - 1] = found[block] + nn.functional.linear(back, self.outward[str(block)])
        return found

    def passed(self, lowest: int) -> list[int]:
        """The blocks that an error passes on its way down to stage `lowest`, from the top."""
        return [block for block in self.blocks if block > lowest]


def _to_values(record: Record, error: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
    """The error at the values of an attention whose output has this one; differentiable in the error."""
    mix = record.consumer
    assert mix is not None
    inputs = [x.detach() for x in mix.inputs]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the only kernel with a second derivative
        inputs[record.slot].requires_grad_()
        output = mix.run(*inputs)
        return torch.autograd.grad(
            output, inputs[record.slot], error.to(output.dtype), create_graph=error.requires_grad
        )[0].to(error.dtype)
