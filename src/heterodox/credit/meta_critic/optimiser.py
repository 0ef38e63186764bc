"""AdamW for the rule's own networks, which the run's update does not move. All state is there from the start."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from heterodox.core.state import Tree, restore


class MetaOptimiser:
    """AdamW over named parameters, each group of names with its learning rate; a step may leave some out."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        rates: Mapping[str, float],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        warmup: int,
    ) -> None:
        self.parameters = dict(parameters)
        self.rates = dict(rates)
        self.betas = betas
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.steps = {name: torch.zeros((), dtype=torch.float32, device=p.device) for name, p in parameters.items()}

    @torch.no_grad()
    def apply(self, grads: Mapping[str, Tensor], step: int) -> None:
        """One step, number `step` from 0, of the parameters in `grads`."""
        scale = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        for rate in dict.fromkeys(self.rates[name] for name in grads):
            names = [name for name in grads if self.rates[name] == rate]
            adamw(
                [self.parameters[name] for name in names],
                [grads[name] for name in names],
                [self.first[name] for name in names],
                [self.second[name] for name in names],
                [],
                [self.steps[name] for name in names],
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=rate * scale,
                weight_decay=self.weight_decay,
                eps=1e-12,
                maximize=False,
            )

    def state(self) -> Tree:
        return {"first_moments": self.first, "second_moments": self.second, "meta_steps": self.steps}

    def load_state(self, tree: Tree) -> None:
        restore(self.first, tree.get("first_moments", {}), "first moment of critic")
        restore(self.second, tree.get("second_moments", {}), "second moment of critic")
        restore(self.steps, tree.get("meta_steps", {}), "step count of critic")


def clip_(grads: Mapping[str, Tensor], limit: float | None) -> None:
    """Scale the gradients in place to a global norm of at most `limit`."""
    if limit is not None and grads:
        norm = get_total_norm(list(grads.values()))
        torch._foreach_mul_(list(grads.values()), torch.clamp(limit / (norm + 1e-6), max=1.0))
