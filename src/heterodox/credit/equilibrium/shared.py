"""What the rules on relaxed states share: the readout's own gradients, the guard on the free phase, the reading off.

With F(z*, θ) = 0 and the loss L(z*), the gradient is (∂F/∂θ)ᵀ a at z*, where the adjoint a solves

    Jᵀ a = −∂L/∂z,    J = ∂F/∂z at z*

`implicit` solves that system; `equilibrium` finds its solution by relaxing once more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.types import Batch, Limit, Origin
from heterodox.model.dynamics import Dynamical, Dynamics, Matmuls, Relaxed

DIVERGING = (
    "The free phase no longer reaches a fixed point, so what is read off the states is no gradient. Likely remedies: "
    "credit.jacobian_penalty, a lower update.lr, more model.steps, more model.damping."
)


def dynamics_of(model: LanguageModel, batch: Batch) -> Dynamics:
    """The model's relaxation on `batch`; embeddings with their graph."""
    return cast(Dynamical, model).dynamics(batch.inputs)


@dataclass
class Readout:
    """The readout's half of a signal, and what it asks of the states."""

    grads: dict[str, Tensor]
    loss: Float[Tensor, ""]
    losses: Float[Tensor, " batch"]
    nudge: Float[Tensor, "batch time width"]
    """∂L/∂z at the last layer, L being the sum of the tokens' losses, each times its example's weight."""


def read_out(
    model: LanguageModel,
    hidden: Float[Tensor, "batch time width"],
    batch: Batch,
    weights: Float[Tensor, " batch"],
    objective: Objective,
) -> Readout:
    """Loss, exact gradients of the readout's parameters, and the nudge at `hidden`."""
    parameters = {name: model.get_parameter(name) for name in sorted(model.readout_names)}
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        view = hidden.view_as(hidden)  # FlopCounterMode cannot follow a leaf into a module
        losses = objective.losses(model.readout(view), batch)
    sums = weights.to(losses) * hidden.shape[1]
    nudge, *grads = torch.autograd.grad(losses, [hidden, *parameters.values()], sums)
    grads = dict(zip(parameters, torch._foreach_div(grads, batch.num_tokens), strict=True))
    return Readout(grads, (losses * weights).mean().detach(), losses.detach(), nudge)


def relaxed_names(model: LanguageModel) -> list[str]:
    """Names of the parameters that the relaxation uses: all but the readout's."""
    return [name for name, _ in model.named_parameters() if name not in model.readout_names]


def fixed_point_manifest(model: LanguageModel) -> dict[str, Origin]:
    """Read off relaxed states, but for the head (exact) and the final norm (exact, through the head)."""
    return readout_exact(model, "equilibrium")


def readout_exact(model: LanguageModel, elsewhere: Origin) -> dict[str, Origin]:
    """The head exact, the final norm exact through the head, everything else by `elsewhere`."""
    origins: dict[str, Origin] = {
        name: "backprop" if name in model.readout_names else elsewhere for name, _ in model.named_parameters()
    }
    origins["head.weight"] = "exact"
    return origins


def drive_flops(cost: Matmuls) -> int:
    """FLOPs of one evaluation of the force."""
    return cost.linear + cost.attention


def product_flops(cost: Matmuls) -> int:
    """FLOPs of one product with the Jacobian or its transpose."""
    return cost.linear + 2 * cost.attention


def reading_flops(cost: Matmuls) -> int:
    """FLOPs of (∂F/∂θ)ᵀ a: weight gradients, and the errors within each block."""
    return 2 * cost.linear + 2 * cost.attention - cost.entering


def withhold_unsettled(
    adjoint: Float[Tensor, "layers batch time width"],
    relaxed: Relaxed,
    limit: float | None,
    metrics: dict[str, Tensor],
) -> Float[Tensor, "layers batch time width"]:
    """`adjoint`, but zero for examples whose last step was longer than `limit` times its displacement.

    What is read off a state that still moves is no gradient, and where it runs away, a single example drowns the rest
    of its batch. Their share is written to `metrics`. Without a limit nothing is withheld.
    """
    if limit is None:
        return adjoint
    settled = relaxed.residuals <= limit  # also false for NaN
    metrics["unsettled"] = 1 - settled.to(adjoint.dtype).mean()
    return torch.where(settled, adjoint, 0.0)


def residual_limit(limit: float | None, meaning: str = DIVERGING) -> dict[str, Limit]:
    """The guard on the free phase, as a signal holds it."""
    return {} if limit is None else {"free_residual": Limit(limit, meaning)}


def needs_equilibrium_model(credit: str, recipe: Any) -> list[str]:
    """A refusal for a model that does not relax, and for a precision without enough digits."""
    reasons = []
    if recipe.model.name != "equilibrium":
        reasons.append(f"credit {credit} needs model equilibrium, whose state relaxes; found model {recipe.model.name}")
    if recipe.run.precision == "bfloat16":
        reasons.append(
            f"credit {credit} needs run.precision float32 or float64: bfloat16's 3 digits are too few for a fixed point"
        )
    return reasons


def plus(grads: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum of two sets of gradients, name by name."""
    return {name: grad + more[name] if name in more else grad for name, grad in grads.items()}


def block_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the Jacobian depends on."""
    return {name: p for name, p in model.named_parameters() if name.startswith("blocks.")}
