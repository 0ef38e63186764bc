"""Every example counts the same."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.protocols import Stateless
from heterodox.core.types import Batch
from heterodox.rating.base import RatingConfig


class Uniform(Stateless):
    """Weight 1 for each example."""

    class Config(RatingConfig):
        name: Literal["uniform"] = "uniform"

        def build(self) -> "Uniform":
            return Uniform()

    def weights(self, batch: Batch) -> Float[Tensor, " batch"]:
        return torch.ones(batch.ids.shape, device=batch.inputs.device)
