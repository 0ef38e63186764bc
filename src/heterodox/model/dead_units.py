"""Hidden units of an MLP that do nothing: taking them out changes no logit.

A unit without outgoing connections says nothing to anybody. One without incoming connections is a constant, the
activation of its bias; folded into the bias of the layer behind, it can go as well. What is left of their connections
goes with them. Under a hard top-k a unit matters by the place that it takes, so only units that are 0 may go.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from heterodox.model.block import MLP


def remove_dead_units(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Bool[Tensor, " hidden"]]:
    """Zero, in place, all that belongs to dead units of the model's MLPs; for each MLP, by name, which units live.

    `masks` by parameter name say which entries exist; matrices without one have them all. The masks change alike.
    """
    alive = {}
    for name, mlp in model.named_modules():
        if not isinstance(mlp, MLP):
            continue
        into = masks.get(f"{name}.fc.weight", torch.ones_like(mlp.fc.weight, dtype=torch.bool))
        out = masks.get(f"{name}.proj.weight", torch.ones_like(mlp.proj.weight, dtype=torch.bool))
        dead = _dead(mlp, into, out)
        if mlp.fc.bias is not None and mlp.proj.bias is not None:
            constant = dead & ~into.any(dim=1)
            with torch.no_grad():
                said = mlp.proj.weight[:, constant] @ mlp.act(mlp.fc.bias[constant])
                mlp.proj.bias.add_(said)
        _clear(mlp, into, out, dead)
        alive[name] = ~dead
    return alive


def _dead(mlp: MLP, into: Tensor, out: Tensor) -> Bool[Tensor, " hidden"]:
    unfed, unheard = ~into.any(dim=1), ~out.any(dim=0)
    if isinstance(mlp.top_k, nn.Identity):
        return unfed | unheard
    return unfed if mlp.fc.bias is None else unfed & (mlp.fc.bias == 0)


@torch.no_grad()
def _clear(mlp: MLP, into: Tensor, out: Tensor, dead: Tensor) -> None:
    mlp.fc.weight[dead] = 0
    mlp.proj.weight[:, dead] = 0
    into[dead] = False
    out[:, dead] = False
    if mlp.fc.bias is not None:
        mlp.fc.bias[dead] = 0
