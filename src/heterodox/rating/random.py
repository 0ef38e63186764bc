"""Keep a random share of each batch: what filtering does where scores say nothing.

It trains on as many examples as any other filter and drops as many: what another filter gains, it must gain over this.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.errors import CheckpointError
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.core.state import Tree
from heterodox.core.types import Batch
from heterodox.rating.base import FilterConfig
from heterodox.rating.filtering import Filter


class Random(Filter):
    """Scores from the run's random streams, new ones for each batch."""

    class Config(FilterConfig):
        name: Literal["random"] = "random"

        def build(self) -> "Random":
            return Random(keep=self.keep)

    streams = Streams(0)

    def __init__(self, *, keep: float = 0.7) -> None:
        super().__init__(keep=keep)
        self.count = 0

    def connect(self, services: Services) -> None:
        super().connect(services)
        self.streams = services.streams

    def score(self, batch: Batch) -> Float[Tensor, " batch"]:
        size = len(batch.ids)
        drawn = torch.rand(
            size * self.comm.world_size, generator=self.streams.generator("rule", "random rating", self.count)
        )
        self.count += 1
        return drawn[self.comm.rank * size : (self.comm.rank + 1) * size].to(batch.inputs.device)

    def state(self) -> Tree:
        return {"count": self.count}

    def load_state(self, tree: Tree) -> None:
        if "count" not in tree:
            raise CheckpointError("the checkpoint lacks the random rating's count: it belongs to another recipe")
        self.count = int(tree["count"])
