"""The first values of new connections, and the steps in which they learn faster."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from heterodox.core import config
from heterodox.core.state import Tree
from heterodox.update.sparse.masks import Masks

Initial = Literal["zero", "small", "he"]
SMALL = 0.1  # of He's standard deviation
TRUNCATED = 0.8796256610342398
"""The standard deviation of a normal distribution that is cut off at two of its own."""


class BurnIn(config.Config):
    """A higher learning rate for exactly the connections that are new, for their first steps."""

    steps: int = Field(5, ge=0, description="steps that new connections burn in; 0: none")
    peak: float = Field(1.5, ge=1, description="factor on their learning rate in the last of these; 1 in the first")

    def factor(self, age: int) -> float:
        """The factor in a connection's step number `age`, from 1."""
        return self.peak if self.steps == 1 else 1 + (self.peak - 1) * (age - 1) / (self.steps - 1)


def first_values(
    entries: Int[Tensor, " n"], masks: Masks, counts: list[int], initial: Initial, generator: torch.Generator
) -> Float[Tensor, " n"]:
    """Values for the connections at these flat positions, where each layer has `counts` active ones.

    `he` is a normal distribution, cut off at two standard deviations and widened so that what is left has a standard
    deviation of √(2 / (fan_in · density)); `small` is a tenth of it. Reference: He, Zhang, Ren and Sun, "Delving deep
    into rectifiers", ICCV 2015.
    """
    if initial == "zero":
        return torch.zeros(len(entries), device=entries.device)
    stds = [
        math.sqrt(2 * numel / (shape[1] * max(count, 1)))
        for shape, numel, count in zip(masks.shapes.values(), masks.sizes, counts, strict=True)
    ]
    drawn = torch.empty(len(entries))
    torch.nn.init.trunc_normal_(drawn, a=-2.0, b=2.0, generator=generator).div_(TRUNCATED)
    scale = torch.tensor(stds, device=entries.device)[masks.layers(entries)]
    return drawn.to(entries.device) * scale * (SMALL if initial == "small" else 1.0)


class Nursery:
    """The connections that are burning in: their positions by matrix, and how many steps they have taken."""

    def __init__(self, burn_in: BurnIn) -> None:
        self.burn_in = burn_in
        self.entries: dict[str, Int[Tensor, " n"]] = {}
        self.age = 0

    def fill(self, masks: Masks, grown: Int[Tensor, " n"]) -> None:
        """Take in the connections at these flat positions, in place of all before."""
        self.entries, self.age = {}, 0
        if not self.burn_in.steps:
            return
        layers = masks.layers(grown)
        for number, (name, start) in enumerate(zip(masks.names, masks.starts, strict=True)):
            if len(inside := grown[layers == number] - start):
                self.entries[name] = inside

    def before(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values of the young connections of these parameters, before they take a step."""
        return {
            name: parameters[name].view(-1)[entries] for name, entries in self.entries.items() if name in parameters
        }

    def after(self, parameters: dict[str, Tensor], before: dict[str, Tensor]) -> None:
        """Lengthen the step that they have taken by the factor of their age.

        That is what a higher learning rate does wherever a step is proportional to it, as SGD's and AdamW's are.
        """
        if not self.entries:
            return
        self.age += 1
        factor = self.burn_in.factor(self.age)
        if factor != 1:
            for name, old in before.items():
                flat, entries = parameters[name].view(-1), self.entries[name]
                flat[entries] = old + factor * (flat[entries] - old)
        if self.age >= self.burn_in.steps:
            self.entries, self.age = {}, 0

    def state(self) -> Tree:
        return {"entries": self.entries, "age": self.age}

    def load_state(self, tree: Tree) -> None:
        self.entries, self.age = dict(tree["entries"]), tree["age"]
