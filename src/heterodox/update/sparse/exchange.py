"""What SET and RigL share: every so often the smallest weights of each layer go, and as many other connections come."""

from abc import abstractmethod

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from heterodox.update.sparse.distribution import Distribution
from heterodox.update.sparse.masks import Masks, largest, smallest
from heterodox.update.sparse.schedule import DecayingSchedule
from heterodox.update.sparse.topology import Change, Sight, Topology, require_one


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
