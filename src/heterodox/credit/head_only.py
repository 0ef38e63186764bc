"""Only the readout learns: the floor that a rule must beat before it may be said to train the blocks.

The blocks stay as they were drawn; the head and the final normalisation get their exact gradient. With
`embeddings: backprop` the embeddings learn too, through the frozen blocks: the fairer floor for a rule whose own
embeddings are trained by backprop.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core import config
from heterodox.core.protocols import LanguageModel, Objective, Stateless
from heterodox.core.rng import Streams
from heterodox.core.types import Batch, Cost, Origin, Signal
from heterodox.credit.backprop import differentiate


class HeadOnly(Stateless):
    """The exact gradient of the readout (and, if asked, of the embeddings); nothing for the blocks."""

    class Config(config.Config):
        name: Literal["head_only"] = "head_only"
        embeddings: Literal["frozen", "backprop"] = "frozen"

        def build(self, model: LanguageModel, streams: Streams) -> "HeadOnly":
            return HeadOnly(embeddings=self.embeddings)

    def __init__(self, *, embeddings: Literal["frozen", "backprop"] = "frozen") -> None:
        self.embeddings = embeddings

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        if self.embeddings == "backprop":
            forward = model
        else:

            def forward(tokens: Tensor) -> Tensor:
                with torch.no_grad():
                    hidden = model.features(tokens)
                return model.readout(hidden)

        names = [name for name, origin in self.manifest(model).items() if origin != "frozen"]
        signal = differentiate(model, batch, weights, objective, names, forward)
        forward_flops = model.forward_flops(*batch.inputs.shape)
        backward_flops = 2 * forward_flops.head
        if self.embeddings == "backprop":
            backward_flops += forward_flops.linear + 2 * forward_flops.attention
        signal.cost = Cost(tokens=batch.num_tokens, flops=forward_flops.total + backward_flops)
        return signal

    def manifest(self, model: LanguageModel) -> dict[str, Origin]:
        learning = model.readout_names
        if self.embeddings == "backprop":
            learning |= model.embedding_names
        origins: dict[str, Origin] = {
            name: "backprop" if name in learning else "frozen" for name, _ in model.named_parameters()
        }
        origins["head.weight"] = "exact"
        return origins
