"""Adam with decoupled weight decay."""

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Literal

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor, nn
from torch.optim.adamw import adamw

from heterodox.core import slot as config
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.services import Services
from heterodox.core.state import Tree

# Moments in a checkpoint: an update makes them as it needs them, so their names are saved beside them.


def check_names(saved: Tree, found: Iterable[str], what: str) -> None:
    """Raise `CheckpointError` unless `found` are the names that `saved` says it was written with."""
    if "names" not in saved:
        raise CheckpointError(f"the checkpoint lacks the {what} every parameter: it belongs to another recipe")
    if differing := set(saved["names"]) ^ set(found):
        name = min(differing)
        place = "lacks the" if name in saved["names"] else "has unknown"
        raise CheckpointError(f"the checkpoint {place} {what} {name!r}: it is damaged, or belongs to another recipe")


MOMENTS = {"first", "second", "step"}


class AdamW:
    """Adam with decoupled weight decay.

        m ← β₁ m + (1−β₁) g,  v ← β₂ v + (1−β₂) g²,  w ← w − η λ w − η m̂ / (√v̂ + ε)

    Reference: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019. The arithmetic is PyTorch's
    own (fused where it has a kernel); the moments are kept by parameter name. Where entries have been forgotten, each
    has an age of its own, and its bias is corrected by that: m̂ = m / (1 − β₁^age), v̂ = v / (1 − β₂^age).

    AdamW over named parameters. A parameter that has had no gradient has no moments and does not decay.
    """

    class Config(config.Config):
        name: Literal["adamw"] = "adamw"
        lr: float = Field(1e-3, gt=0, description="learning rate")
        beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
        beta2: float = Field(0.99, ge=0, lt=1, description="decay of the second moment")
        eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
        weight_decay: float = Field(0.1, ge=0, description="decoupled: a share of the weight, times the learning rate")
        decay: Literal["matrices", "all"] = Field("matrices", description="matrices: not gains and biases")
        spared: tuple[str, ...] = Field((), description="patterns of names that never decay, such as `*_emb.weight`")

        def build(self) -> "AdamW":
            return AdamW(
                lr=self.lr,
                betas=(self.beta1, self.beta2),
                eps=self.eps,
                weight_decay=self.weight_decay,
                decay=self.decay,
                spared=self.spared,
            )

    def __init__(
        self,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay: Literal["matrices", "all"] = "matrices",
        spared: Sequence[str] = (),
    ) -> None:
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.decay = decay
        self.spared = tuple(spared)
        self.moments: dict[str, dict[str, Tensor]] = {}

    def connect(self, services: Services) -> None:
        """Refuse patterns that match no parameter."""
        names = [name for name, _ in services.model.named_parameters()]
        for pattern in self.spared:
            if not any(fnmatch(name, pattern) for name in names):
                raise RecipeError(f"spared: {pattern!r} matches no parameter; there is, for one, {names[0]}")

    @torch.no_grad()
    def apply(self, parameters: Mapping[str, nn.Parameter], grads: Mapping[str, Tensor], scale: float = 1.0) -> None:
        decayed = [name for name in grads if self.decays(name, parameters[name])]
        plain = [name for name in grads if not self.decays(name, parameters[name])]
        for names, weight_decay in ((decayed, self.weight_decay), (plain, 0.0)):
            moments = {name: self._moments_of(name, parameters[name]) for name in names}
            mixed = [name for name in names if moments[name]["step"].ndim]
            for group, move in ((mixed, self._move_by_age), ([n for n in names if n not in mixed], self._move)):
                if group:
                    weights: list[Tensor] = [parameters[name] for name in group]
                    first, second, steps = (
                        [moments[name][kind] for name in group] for kind in ("first", "second", "step")
                    )
                    move(weights, [grads[n] for n in group], first, second, steps, self.lr * scale, weight_decay)

    def _move(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        steps: list[Tensor],
        lr: float,
        weight_decay: float,
    ) -> None:
        adamw(
            weights,
            grads,
            first,
            second,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )

    def _move_by_age(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        ages: list[Tensor],
        lr: float,
        weight_decay: float,
    ) -> None:
        """The same step where every entry has an age of its own."""
        beta1, beta2 = self.betas
        torch._foreach_add_(ages, 1)
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        size = list(torch._foreach_div(second, _correction(ages, beta2)))
        torch._foreach_sqrt_(size)
        torch._foreach_add_(size, self.eps)
        torch._foreach_mul_(size, _correction(ages, beta1))
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_addcdiv_(weights, first, size, -lr)

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay acts on a parameter of that name."""
        matrix = self.decay == "all" or parameter.ndim >= 2
        return matrix and not any(fnmatch(name, pattern) for pattern in self.spared)

    def _moments_of(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        if name not in self.moments:
            self.moments[name] = {
                "first": torch.zeros_like(parameter),
                "second": torch.zeros_like(parameter),
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            }
        return self.moments[name]

    @torch.no_grad()
    def forget(self, name: str, entries: Bool[Tensor, "*shape"]) -> None:
        if (moments := self.moments.get(name)) is not None:
            moments["first"].masked_fill_(entries, 0)
            moments["second"].masked_fill_(entries, 0)
            ages = moments["step"].to(moments["first"].dtype)
            moments["step"] = ages.expand_as(entries).masked_fill(entries, 0)

    def state(self) -> Tree:
        return {"moments": self.moments, "names": sorted(self.moments)}

    def load_state(self, tree: Tree) -> None:
        saved = tree.get("moments", {})
        check_names(tree, [name for name, moments in saved.items() if moments.keys() >= MOMENTS], "moments of")
        self.moments = {name: dict(moments) for name, moments in saved.items()}


def _correction(ages: list[Tensor], beta: float) -> list[Tensor]:
    """1 − β^age of every entry."""
    exponents = list(torch._foreach_mul(ages, math.log(beta) if beta else -math.inf))
    torch._foreach_expm1_(exponents)
    return list(torch._foreach_neg(exponents))
