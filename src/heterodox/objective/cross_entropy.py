"""Next-token cross-entropy."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heterodox.core import slot as config
from heterodox.core.protocols import Stateless
from heterodox.core.types import Batch


class CrossEntropy(Stateless):
    """Next-token cross-entropy.

    −log p(target), averaged over the positions of each example; nats per token.
    """

    class Config(config.Config):
        name: Literal["cross_entropy"] = "cross_entropy"

        def build(self) -> "CrossEntropy":
            return CrossEntropy()

    def losses(self, logits: Float[Tensor, "batch time vocab"], batch: Batch) -> Float[Tensor, " batch"]:
        return self.token_losses(logits, batch).mean(dim=1)

    def token_losses(self, logits: Float[Tensor, "batch time vocab"], batch: Batch) -> Float[Tensor, "batch time"]:
        flat = logits.flatten(0, 1)
        wide = flat if flat.dtype.itemsize >= 4 else flat.float()
        return F.cross_entropy(wide, batch.targets.flatten(), reduction="none").view(batch.targets.shape)
