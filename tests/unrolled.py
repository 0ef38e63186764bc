"""The naive meta-gradient: `create_graph` through every step, written down independently of the adjoint."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


def clipped(grads: list[Tensor], limit: float | None) -> list[Tensor]:
    if limit is None:
        return grads
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    return [g * factor for g in grads]


def adamw(lr: float, betas=(0.9, 0.999), eps: float = 1e-8, eps_root: float = 0.0, weight_decay: float = 0.01):
    """A differentiable AdamW step on lists of tensors."""

    def step(weights: list[Tensor], grads: list[Tensor], state: dict[str, Any]) -> list[Tensor]:
        state["t"] = state.get("t", 0) + 1
        m = state.get("m") or [torch.zeros_like(w) for w in weights]
        v = state.get("v") or [torch.zeros_like(w) for w in weights]
        state["m"] = m = [betas[0] * a + (1 - betas[0]) * g for a, g in zip(m, grads, strict=True)]
        state["v"] = v = [betas[1] * a + (1 - betas[1]) * g * g for a, g in zip(v, grads, strict=True)]
        c1, c2 = 1 - betas[0] ** state["t"], 1 - betas[1] ** state["t"]
        return [
            w - lr * weight_decay * w - lr * (a / c1) / ((b / c2 + eps_root).sqrt() + eps)
            for w, a, b in zip(weights, m, v, strict=True)
        ]

    return step


def sgd(lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
    """A differentiable SGD step on lists of tensors."""

    def step(weights: list[Tensor], grads: list[Tensor], state: dict[str, Any]) -> list[Tensor]:
        directions = [g + weight_decay * w for g, w in zip(grads, weights, strict=True)]
        if momentum:
            before = state.get("u") or [torch.zeros_like(w) for w in weights]
            state["u"] = [momentum * u + d for u, d in zip(before, directions, strict=True)]
            directions = (
                [d + momentum * u for d, u in zip(directions, state["u"], strict=True)] if nesterov else state["u"]
            )
        return [w - lr * d for w, d in zip(weights, directions, strict=True)]

    return step


class Bound(nn.Module):
    """A model at other weights, called as the model is."""

    def __init__(self, model: nn.Module, names: list[str], weights: list[Tensor]) -> None:
        super().__init__()
        self.call = lambda *inputs: functional_call(model, dict(zip(names, weights, strict=True)), inputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs)


def unrolled(
    model: nn.Module,
    losses: Callable[[Any, Any], Tensor],
    batches: Sequence[Any],
    weighting: Callable[[Any], Tensor],
    validation: Sequence[Any],
    step: Callable[..., list[Tensor]],
    *,
    clip_norm: float | None = None,
    given: Sequence[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """L_val with its graph, the weights of the examples at each step, and the gradient norms; the model is untouched.

    `given` takes the place of the weighting's answers.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    weights = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    state: dict[str, Any] = {}
    used, norms = [], []
    with sdpa_kernel(SDPBackend.MATH):
        for index, batch in enumerate(batches):
            w = weighting(batch) if given is None else given[index]
            used.append(w)
            loss = (w * losses(Bound(model, names, weights), batch)).mean()
            grads = list(torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True))
            norms.append(torch.stack([g.detach().square().sum() for g in grads]).sum().sqrt())
            weights = step(weights, clipped(grads, clip_norm), state)
        found = [losses(Bound(model, names, weights), batch).mean() for batch in validation]
    return torch.stack(found).mean(), used, norms
