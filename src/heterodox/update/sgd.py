"""Stochastic gradient descent with momentum."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.sgd import sgd

from heterodox.core import slot as config
from heterodox.core.state import Tree
from heterodox.update.adamw import check_names


class SGD:
    """Stochastic gradient descent with momentum.

        u ← μ u + g + λ w,   w ← w − η u

    Reference: Robbins and Monro, "A stochastic approximation method", 1951; momentum: Polyak, 1964. The arithmetic is
    PyTorch's own (fused where it has a kernel).

    SGD over named parameters; velocities are kept by parameter name.
    """

    class Config(config.Config):
        name: Literal["sgd"] = "sgd"
        lr: float = Field(0.1, gt=0, description="learning rate")
        momentum: float = Field(0.0, ge=0, lt=1, description="of the velocity")
        nesterov: bool = Field(False, description="look ahead along the velocity")
        weight_decay: float = Field(0.0, ge=0, description="added to the gradient")

        @model_validator(mode="after")
        def _nesterov_needs_momentum(self) -> "SGD.Config":
            if self.nesterov and not self.momentum:
                raise ValueError("nesterov needs a momentum above 0")
            return self

        def build(self) -> "SGD":
            return SGD(
                lr=self.lr,
                momentum=self.momentum,
                nesterov=self.nesterov,
                weight_decay=self.weight_decay,
            )

    def __init__(
        self, *, lr: float = 0.1, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
    ) -> None:
        self.lr = lr
        self.momentum = momentum
        self.nesterov = nesterov
        self.weight_decay = weight_decay
        self.velocity: dict[str, Tensor] = {}

    @torch.no_grad()
    def apply(self, parameters: Mapping[str, nn.Parameter], grads: Mapping[str, Tensor], scale: float = 1.0) -> None:
        if not grads:
            return
        velocity: list[Tensor | None] = [None] * len(grads)
        if self.momentum:
            for name in grads.keys() - self.velocity.keys():
                self.velocity[name] = torch.zeros_like(parameters[name])
            velocity = [self.velocity[name] for name in grads]
        sgd(
            [parameters[name] for name in grads],
            list(grads.values()),
            velocity,
            fused=not any(isinstance(gradient, FakeTensor) for gradient in grads.values()),  # there is no such kernel
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=self.lr * scale,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
        )

    @torch.no_grad()
    def forget(self, name: str, entries: Bool[Tensor, "*shape"]) -> None:
        if name in self.velocity:
            self.velocity[name].masked_fill_(entries, 0)

    def state(self) -> Tree:
        return {"velocity": self.velocity, "names": sorted(self.velocity)} if self.momentum else {}

    def load_state(self, tree: Tree) -> None:
        saved = tree.get("velocity", {})
        if self.momentum:
            check_names(tree, saved, "velocity of")
        self.velocity = dict(saved)
