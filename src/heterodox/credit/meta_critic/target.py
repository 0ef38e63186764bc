"""The global target G_T = MLP_G(…) and its local copies LTF_i = M_i G_T.

    pooled   G = MLP_G([h̄_N ‖ L]), one vector a step: the source's. It knows nothing of the labels but the loss.
    token    G_t = MLP_G([h_N,t ‖ L_t])
    error    G_t = MLP_G(h_N,t, ê_t) with a linear path,  ê_t = e_t / ρ_t,  ρ_t = rms(e_t),  e = B·T ∂L/∂h_N

e is the error in hidden space, carried back through head and final norm alone. A true error at a layer is linear in
it, so its size ρ_t is taken off the critics' inputs and put back onto their outputs; with the other targets that size
is the example's weight. An error grows on its way down through norms as the stream gets shorter: at stage i the size is
ρ_t spread(h_N) / spread(h_i). What MLP_G sees is detached; G is not.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heterodox.core.comm import Comm
from heterodox.core.errors import RecipeError
from heterodox.core.extensions import PerToken
from heterodox.core.protocols import Objective
from heterodox.credit.meta_critic.forward import Forward
from heterodox.credit.meta_critic.network import Network

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
