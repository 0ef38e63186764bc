"""Gradual magnitude pruning: dense at first, then the smallest weights go, fast at the beginning and slowly at the end.

    s_t = s · (1 − (1 − (t − t₀)/(t₁ − t₀))³)

Not sparse from the start, so its early steps could not be made cheaper; in the field it is the baseline that is hard to
beat. Reference: Zhu and Gupta, "To prune, or not to prune", ICLR workshop 2018.
"""

from typing import Literal

import torch
from pydantic import Field

from heterodox.update.sparse.distribution import Distribution, distribute
from heterodox.update.sparse.masks import Masks, largest
from heterodox.update.sparse.schedule import Schedule, cubic
from heterodox.update.sparse.topology import Change, Sight, Topology


class Magnitude(Topology):
    """From a dense mask to the wanted one by dropping what is smallest, in each layer or in all of them at once."""

    class Config(Schedule):
        name: Literal["magnitude"] = "magnitude"
        scope: Literal["layer", "global"] = Field(
            "layer", description="compare weights within a layer, which keeps the distribution, or all of them"
        )

        def build(self) -> "Magnitude":
            return Magnitude(self, scope=self.scope)

    def __init__(self, schedule: Schedule, *, scope: Literal["layer", "global"] = "layer") -> None:
        self.schedule = schedule
        self.scope = scope
        self.targets: list[int] = []

    def start(self, masks: Masks, sparsity: float, distribution: Distribution) -> list[int]:
        self.targets = distribute(masks.shapes, sparsity, distribution)
        return list(masks.sizes)

    def change(self, sight: Sight) -> Change | None:
        assert self.schedule is not None
        last = sight.step + self.schedule.every > self.schedule.last(sight.steps)
        done = 1.0 if last else cubic(self.schedule.progress(sight.step, sight.steps))
        masks, size = sight.masks, sight.weights.abs()
        if self.scope == "global":
            wanted = masks.size - round(done * (masks.size - sum(self.targets)))
            count = min(wanted, int(masks.flat.sum()))  # a run that is made longer does not bring back what went
            flat = torch.zeros_like(masks.flat)
            flat[largest(size, masks.flat, count)] = True
            return Change(flat)
        flat = torch.zeros_like(masks.flat)
        rows = zip(masks.sizes, self.targets, flat.split(masks.sizes), strict=True)
        active = zip(size.split(masks.sizes), masks.flat.split(masks.sizes), strict=True)
        for (numel, target, kept), (magnitudes, before) in zip(rows, active, strict=True):
            count = min(numel - round(done * (numel - target)), int(before.sum()))
            kept[largest(magnitudes, before, count)] = True
        return Change(flat)
