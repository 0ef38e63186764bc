"""How sparse a layer may become, and the widening of that for layers where nothing moves.

A layer whose gradient activity stays below a threshold for some events in a row may become sparser by a share of its
size, up to a cap above the network's sparsity. The count of the whole network never changes: what a dead layer gives up
grows elsewhere. (With the source's numbers, at most 95 % and a cap of 5 points above 80 or 90 %, the cap is never above
what is allowed anyway; it matters where `max_sparsity` is lower.)
"""

import math

from pydantic import Field, model_validator

from heterodox.core import config
from heterodox.core.state import Tree


class BoundsOptions(config.Config):
    """Least and greatest sparsity of a layer."""

    min_sparsity: float = Field(0.5, ge=0, lt=1, description="of any layer")
    max_sparsity: float = Field(0.95, gt=0, lt=1, description="of any layer, at the beginning")
    dead_below: float = Field(1e-4, ge=0, description="gradient activity below which a layer counts as dead")
    dead_events: int = Field(10, ge=1, description="events in a row before a dead layer's bound is widened")
    widen: float = Field(0.05, ge=0, le=1, description="share of its weights that it may then do without besides")
    cap: float = Field(0.05, ge=0, le=1, description="sparsity above the network's that widening may reach")

    @model_validator(mode="after")
    def _in_order(self) -> "BoundsOptions":
        if self.min_sparsity > self.max_sparsity:
            raise ValueError(f"min_sparsity {self.min_sparsity} is above max_sparsity {self.max_sparsity}")
        return self

    def complaints(self, sparsity: float) -> list[str]:
        """What is wrong with these bounds for a network of this sparsity."""
        if sparsity == 0 or self.min_sparsity <= sparsity <= self.max_sparsity:
            return []
        return [
            f"update.sparsity {sparsity} lies outside of what update.topology.bounds allow to every layer, "
            f"{self.min_sparsity} to {self.max_sparsity}: the global count cannot be met"
        ]


class Bounds:
    """Least and most connections of each layer, as numbers."""

    def __init__(self, options: BoundsOptions, sizes: list[int], sparsity: float) -> None:
        self.options = options
        self.sizes = sizes
        self.lower = [max(1, math.ceil((1 - options.max_sparsity) * size - 1e-9)) for size in sizes]
        most = [math.floor((1 - options.min_sparsity) * size + 1e-9) for size in sizes]
        self.upper = [max(low, high) for low, high in zip(self.lower, most, strict=True)]  # at least one in each
        cap = min(sparsity + options.cap, 1.0)
        self._floor = [max(1, math.ceil((1 - cap) * size - 1e-9)) for size in sizes]
        self.dead = [0] * len(sizes)

    def note(self, activities: list[float]) -> list[int]:
        """Take in each layer's gradient activity; the layers whose bound has been widened now."""
        widened = []
        for layer, activity in enumerate(activities):
            self.dead[layer] = self.dead[layer] + 1 if activity < self.options.dead_below else 0
            if self.dead[layer] < self.options.dead_events:
                continue
            self.dead[layer] = 0
            step = round(self.options.widen * self.sizes[layer])
            lower = max(self.lower[layer] - step, min(self._floor[layer], self.lower[layer]))
            if lower < self.lower[layer]:
                self.lower[layer] = lower
                widened.append(layer)
        return widened

    def state(self) -> Tree:
        return {"lower": self.lower, "dead": self.dead}

    def load_state(self, tree: Tree) -> None:
        self.lower, self.dead = list(tree["lower"]), list(tree["dead"])
