"""What the proposals would do to the loss: each stage's alone, and all of them at once.

    gain_i = L(W) − L(W_i − η ΔW_i)        gain_joint = L(W) − L(W_1 − η ΔW_1, …, W_N − η ΔW_N)

All of them are of the same ΔW, those that are handed to the update, and of weights, whatever the partial forwards of
the meta-step try. So they can be compared with each other: of ΔW that do not meet, the joint gain is the sum.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from heterodox.core.protocols import Objective
from heterodox.credit.meta_critic.forward import Forward
from heterodox.credit.meta_critic.layout import Stage
from heterodox.credit.meta_critic.meta import MetaObjective
from heterodox.credit.meta_critic.partial import joint_losses, partial_losses
from heterodox.model import GPT


@torch.no_grad()
def proposal_gains(
    model: GPT,
    seen: Forward,
    objective: Objective,
    stages: Sequence[Stage],
    matrices: Mapping[int, Mapping[str, Tensor]],
    meta: MetaObjective,
) -> dict[str, Tensor]:
    """By the stages' keys and `joint`, how far the loss falls."""
    hypotheses = {
        stage.index: {name: meta.weight(model.get_parameter(name), x) for name, x in matrices[stage.index].items()}
        for stage in stages
    }
    losses: dict[int, Tensor] = {}
    for group in meta.groups(stages):
        losses |= partial_losses(model, seen, objective, {stage.index: hypotheses[stage.index] for stage in group})
    every = {name: weight for found in hypotheses.values() for name, weight in found.items()}
    together = joint_losses(model, seen, objective, every)
    named = {stage.key: losses[stage.index] for stage in stages} | {"joint": together}
    return {key: seen.loss - (found * seen.weights).mean() for key, found in named.items()}
