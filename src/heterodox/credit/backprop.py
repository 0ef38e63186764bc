"""Backpropagation: the exact gradient, and the ceiling of every comparison."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core import slot as config
from heterodox.core.protocols import LanguageModel, Objective, Stateless
from heterodox.core.rng import Streams
from heterodox.core.types import Batch, Cost, Origin, Signal


class Backprop(Stateless):
    """Backpropagation: the exact gradient, and the ceiling of every comparison.

        δ_l = W_{l+1}ᵀ δ_{l+1} ⊙ f'(a_l),   ΔW_l ∝ δ_l x_lᵀ

    Reference: Rumelhart, Hinton and Williams, "Learning representations by back-propagating errors", Nature 1986.

    The exact gradient of the weighted loss, for every parameter.
    """

    class Config(config.Config):
        name: Literal["backprop"] = "backprop"

        def build(self, model: LanguageModel, streams: Streams) -> "Backprop":
            return Backprop()

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        signal = differentiate(model, batch, weights, objective, trainable(model))
        flops = model.forward_flops(*batch.inputs.shape).with_backward
        signal.cost = Cost(tokens=batch.num_tokens, flops=flops)
        return signal

    def manifest(self, model: LanguageModel) -> dict[str, Origin]:
        origins: dict[str, Origin] = {name: "backprop" for name, _ in model.named_parameters()}
        origins["head.weight"] = "exact"
        return origins | frozen(model)


def trainable(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that require a gradient."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def frozen(model: torch.nn.Module) -> dict[str, Origin]:
    """The manifest's entries of the parameters that do not, and that no rule moves."""
    return {name: "frozen" for name, parameter in model.named_parameters() if not parameter.requires_grad}


def differentiate(
    model: LanguageModel,
    batch: Batch,
    weights: Float[Tensor, " batch"],
    objective: Objective,
    names: Iterable[str],
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Signal:
    """What autograd says of mean(weights · losses), for the parameters in `names`; its cost is left to the caller.

    `forward` maps the batch's inputs to logits and defaults to the model itself.
    """
    losses = objective.losses((forward or model)(batch.inputs), batch)
    loss = (losses * weights).mean()
    names = list(names)
    grads = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    return Signal(dict(zip(names, grads, strict=True)), loss.detach(), losses.detach(), Cost())
