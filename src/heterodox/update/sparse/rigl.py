"""RigL: every so often the smallest weights of each layer go, and connections with the largest gradients come.

The gradients are those of all entries, masked ones too, which costs a dense backward pass in every event. Under another
credit rule than backpropagation they are that rule's signal: what it would have every missing connection do. A
connection that has just gone may come back at once, and then keeps its weight.

Reference: Evci, Gale, Menick, Castro and Elsen, "Rigging the lottery: making all tickets winners", ICML 2020.
"""

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from heterodox.update.sparse.exchange import Exchange, ExchangeOptions
from heterodox.update.sparse.topology import Sight


class RigL(Exchange):
    """Grows where the signal is largest."""

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
