"""SET: every so often the smallest weights of each layer go, and as many random connections come.

Reference: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
network science", Nature Communications 2018.
"""

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from heterodox.update.sparse.exchange import Exchange, ExchangeOptions
from heterodox.update.sparse.topology import Sight


class SET(Exchange):
    """Grows where chance has it, but not where a connection has just gone."""

    class Config(ExchangeOptions):
        name: Literal["set"] = "set"

        def build(self) -> "SET":
            return SET(self)

    def appeal(self, sight: Sight) -> Float[Tensor, " entries"]:
        return sight.random("grow")

    def may_grow(self, mask: Bool[Tensor, " layer"], kept: Bool[Tensor, " layer"]) -> Bool[Tensor, " layer"]:
        return ~mask
