"""How masks change: static, magnitude pruning, SET and RigL, side by side."""

from abc import abstractmethod
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from heterodox.core import slot as config
from heterodox.core.slot import Slot
from heterodox.update.sparse.masks import Distribution, Masks, distribute, largest, smallest
from heterodox.update.sparse.sparsae import Sparsae
from heterodox.update.sparse.topology import Change, DecayingSchedule, Schedule, Sight, Topology, cubic, require_one

# What SET and RigL share: every so often the smallest weights of each layer go, and as many other connections come.


class ExchangeOptions(DecayingSchedule):
    """How much of each layer is exchanged, and when."""

    fraction: float = Field(0.3, gt=0, le=1, description="of a layer's connections that are exchanged in an event")


class Exchange(Topology):
    """Drops by magnitude, layer by layer; siblings differ in what they grow."""

    def __init__(self, options: ExchangeOptions) -> None:
        self.options = self.schedule = options

    def start(self, masks: Masks, sparsity: float, distribution: Distribution) -> list[int]:
        counts = super().start(masks, sparsity, distribution)
        sparse = [count for count, size in zip(counts, masks.sizes, strict=True) if count < size]
        if sparse:
            require_one("fraction", self.options.fraction, max(sparse), "of the largest sparse layer")
        return counts

    @abstractmethod
    def appeal(self, sight: Sight) -> Float[Tensor, " entries"]:
        """What the connections that grow have most of."""

    @abstractmethod
    def may_grow(self, mask: Bool[Tensor, " layer"], kept: Bool[Tensor, " layer"]) -> Bool[Tensor, " layer"]:
        """Where a layer's new connections may come, given those that were there and those that stay."""

    def change(self, sight: Sight) -> Change | None:
        fraction = self.options.decayed(self.options.fraction, sight.step, sight.steps)
        sizes = sight.masks.sizes
        size, appeal = sight.weights.abs(), self.appeal(sight)
        flat = sight.masks.flat.clone()
        for mask, magnitude, growth in zip(flat.split(sizes), size.split(sizes), appeal.split(sizes), strict=True):
            self._exchange(mask, magnitude, growth, fraction)
        return Change(flat, told={"fraction": fraction})

    def _exchange(
        self,
        mask: Bool[Tensor, " layer"],
        magnitude: Float[Tensor, " layer"],
        appeal: Float[Tensor, " layer"],
        fraction: float,
    ) -> None:
        active = int(mask.sum())
        count = min(round(fraction * active), mask.numel() - active)
        if not count:
            return
        kept = mask.clone()
        kept[smallest(magnitude, mask, count)] = False
        grown = largest(appeal, self.may_grow(mask, kept), count)
        mask.copy_(kept)
        mask[grown] = True
        assert int(mask.sum()) == active, f"{active} connections became {int(mask.sum())}"
        assert torch.all(mask >= kept)


class Static(Topology):
    """Static sparsity: a random mask that never changes.

    The floor of every comparison: what the connections' number is worth, wherever they are.

    A mask drawn once.
    """

    class Config(config.Config):
        name: Literal["static"] = "static"

        def build(self) -> "Static":
            return Static()

    def change(self, sight: Sight) -> Change | None:
        return None


class Magnitude(Topology):
    """Gradual magnitude pruning: dense at first, then the smallest weights go, fast at first and slowly at the end.

        s_t = s · (1 − (1 − (t − t₀)/(t₁ − t₀))³)

    Not sparse from the start, so its early steps could not be made cheaper; in the field it is the baseline that is
    hard to beat. Reference: Zhu and Gupta, "To prune, or not to prune", ICLR workshop 2018.

    From a dense mask to the wanted one by dropping what is smallest, in each layer or in all of them at once.
    """

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


class SET(Exchange):
    """SET: every so often the smallest weights of each layer go, and as many random connections come.

    Reference: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity
    inspired by network science", Nature Communications 2018.

    Grows where chance has it, but not where a connection has just gone.
    """

    class Config(ExchangeOptions):
        name: Literal["set"] = "set"

        def build(self) -> "SET":
            return SET(self)

    def appeal(self, sight: Sight) -> Float[Tensor, " entries"]:
        return sight.random("grow")

    def may_grow(self, mask: Bool[Tensor, " layer"], kept: Bool[Tensor, " layer"]) -> Bool[Tensor, " layer"]:
        return ~mask


class RigL(Exchange):
    """RigL: every so often the smallest weights of each layer go, and connections with the largest gradients come.

    The gradients are those of all entries, masked ones too, which costs a dense backward pass in every event. Under
    another credit rule than backpropagation they are that rule's signal: what it would have every missing connection
    do. A connection that has just gone may come back at once, and then keeps its weight.

    Reference: Evci, Gale, Menick, Castro and Elsen, "Rigging the lottery: making all tickets winners", ICML 2020.

    Grows where the signal is largest.
    """

    wants_signal = True

    class Config(ExchangeOptions):
        name: Literal["rigl"] = "rigl"

        def build(self) -> "RigL":
            return RigL(self)

    def appeal(self, sight: Sight) -> Float[Tensor, " entries"]:
        assert sight.signal is not None
        return sight.signal.abs()

    def may_grow(self, mask: Bool[Tensor, " layer"], kept: Bool[Tensor, " layer"]) -> Bool[Tensor, " layer"]:
        return ~kept


# The topologies that a recipe can choose from.


TOPOLOGIES = Slot("topology", Topology, (Static, Magnitude, SET, RigL, Sparsae))

TopologyConfig = TOPOLOGIES.section()
