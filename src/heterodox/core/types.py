"""The values that pass between the slots."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor, nn

Origin = Literal["exact", "backprop", "feedback", "equilibrium", "critic", "local", "perturbation", "random", "frozen"]
"""Where a parameter's signal comes from.

- `exact`: the true gradient, from what the layer itself sees (the output layer under every rule).
- `backprop`: the true gradient, carried back through the transposed weights of other layers.
- `feedback`: carried by fixed or learned feedback weights; in general not the true gradient.
- `equilibrium`: read off relaxed states.
- `critic`: proposed by a learned network.
- `local`: from what the layer itself sees, and not the true gradient: a sign, a Hebbian product, a loss of its own.
- `perturbation`: measured by perturbing weights or activities.
- `random`: a random direction.
- `frozen`: none; the parameter does not move.

The true gradient is autograd's of the model as configured: where the model has a straight-through function or a
LayerNorm whose backward pass is not exact, it is not the derivative of the loss.
"""
ORIGINS: tuple[str, ...] = get_args(Origin)


Alignment = dict[str, dict[str, float | None]]
"""By parameter name: `cosine`, `norm_ratio` and `sign_agreement` with the exact gradient; None where undefined."""


@dataclass(frozen=True)
class Batch:
    """Token windows: `targets` are the `inputs` one position later; `ids` name the examples within their split."""

    inputs: Int[Tensor, "batch context"]
    targets: Int[Tensor, "batch context"]
    ids: Int[Tensor, " batch"]

    @property
    def num_tokens(self) -> int:
        return self.targets.numel()

    def to(self, device: str) -> "Batch":
        if device == "cpu":
            return self
        inputs, targets, ids = (t.to(device, non_blocking=True) for t in (self.inputs, self.targets, self.ids))
        return Batch(inputs, targets, ids)


@dataclass(frozen=True)
class LabelledBatch:
    """Examples whose kind is known, for evaluation alone: label 0 is clean, label k + 1 noise of `kinds[k]`."""

    batch: Batch
    labels: Int[Tensor, " batch"]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """What a step consumed. Multiply–adds count as two FLOPs; elementwise work is not counted.

    Of `flops`, which dense kernels carry out, `masked_flops` multiply weights that a mask holds at zero.
    """

    tokens: int = 0
    meta_tokens: int = 0
    flops: int = 0
    masked_flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.tokens + other.tokens,
            self.meta_tokens + other.meta_tokens,
            self.flops + other.flops,
            self.masked_flops + other.masked_flops,
        )


@dataclass(frozen=True)
class Limit:
    """How large a metric of a rule may become before a run must stop, and what it means when it does."""

    most: float
    meaning: str


@dataclass(frozen=True)
class Diagnosis:
    """What a model says of its health on a batch: numbers for the log, and a sentence for each thing that is wrong."""

    values: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Signal:
    """A credit rule's answer: what each parameter should move against.

    `grads` is keyed by parameter name and lacks frozen parameters. `loss` is the weighted mean that was asked for,
    `losses` the objective of each example; both are detached. A metric past its entry in `limits` stops the run.

    Tensors of the rule's own that learn by the run's update, as the model's do, stand in `own_parameters`, and what
    they move against in `own_grads`, by names that no parameter of the model has. Those gradients are averaged over the
    ranks and scaled with `grads` when these are clipped, but do not count in the norm; they may be the same objects.
    """

    grads: dict[str, Tensor]
    loss: Float[Tensor, ""]
    losses: Float[Tensor, " batch"]
    cost: Cost
    metrics: dict[str, Tensor] = field(default_factory=dict)
    limits: dict[str, Limit] = field(default_factory=dict)
    own_parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    own_grads: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class UpdateReport:
    """What an update that does more than move weights has to tell of a step.

    `events` are rows for the log; each has a `kind` of its own.
    """

    cost: Cost = Cost()
    metrics: dict[str, Tensor] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class StepReport:
    """What one learner step tells the trainer. Tensors stay on the device until somebody logs them."""

    loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    cost: Cost
    metrics: dict[str, Tensor] = field(default_factory=dict)
    alignment: Alignment | None = None
    probe_seconds: float = 0.0
    limits: dict[str, Limit] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
