"""Keeping the best of a batch that was drawn larger: what ratings that score examples share."""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.comm import Comm, Solo
from heterodox.core.services import Services
from heterodox.core.types import Batch, Cost


class Filter(ABC):
    """Keeps the `keep` best of a global batch by `score`, each with weight 1. Higher is better."""

    comm: Comm = Solo()

    def __init__(self, *, keep: float) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"a share of {keep} cannot be kept, expected one in (0, 1]")
        self.keep = keep

    def connect(self, services: Services) -> None:
        self.comm = services.comm

    @abstractmethod
    def score(self, batch: Batch) -> Float[Tensor, " batch"]:
        """One score per example of this rank's share."""

    def kept(self, num_drawn: int) -> int:
        """How many of so many examples are kept."""
        return max(1, math.floor(num_drawn * self.keep + 1e-9))

    def select(self, batch: Batch) -> Batch:
        """This rank's share of the best, in the order in which they were drawn."""
        scores = self.comm.gather(self.score(batch))
        best = scores.topk(self.kept(len(scores))).indices.sort().values
        share = len(best) // self.comm.world_size
        chosen = best[self.comm.rank * share : (self.comm.rank + 1) * share]
        return Batch(*(self.comm.gather(part)[chosen] for part in (batch.inputs, batch.targets, batch.ids)))

    def weights(self, batch: Batch) -> Float[Tensor, " batch"]:
        return torch.ones(batch.ids.shape, device=batch.inputs.device)

    def cost(self, batch: Batch) -> Cost:
        """Of rating `batch` as drawn: the tokens of what is dropped, and `score`'s FLOPs."""
        dropped = len(batch.ids) - self.kept(len(batch.ids) * self.comm.world_size) // self.comm.world_size
        return Cost(meta_tokens=dropped * batch.inputs.shape[1], flops=self.flops(batch))

    def flops(self, batch: Batch) -> int:
        """Of `score`."""
        return 0
