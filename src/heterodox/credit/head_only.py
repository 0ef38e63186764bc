"""Only the readout learns: the floor that a rule must beat before it may be said to train the blocks."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from heterodox.core import slot as config
from heterodox.core.protocols import LanguageModel, Objective, Stateless
from heterodox.core.rng import Streams
from heterodox.core.types import Batch, Cost, Origin, Signal
from heterodox.credit.backprop import differentiate, frozen


class HeadOnly(Stateless):
    """Only the readout learns: the floor that a rule must beat before it may be said to train the blocks.

    The blocks stay as they were drawn; the head and the final normalisation get their exact gradient. With
    `embeddings: backprop` the embeddings learn too, through the frozen blocks: the fairer floor for a rule whose own
    embeddings are trained by backprop.

    The exact gradient of the readout (and, if asked, of the embeddings); nothing for the blocks.
    """

    class Config(config.Config):
        name: Literal["head_only"] = "head_only"
        embeddings: Literal["frozen", "backprop"] = Field(
            "frozen", description="backprop: they learn too, through the frozen blocks"
        )

        def refusals(self, recipe: config.Config) -> list[str]:
            if self.embeddings == "backprop" and recipe.model_dump(include={"model"})["model"].get("frozen_embeddings"):
                return ["credit.embeddings is backprop, but model.frozen_embeddings is true; change one of them"]
            return []

        def build(self, model: LanguageModel, streams: Streams) -> "HeadOnly":
            return HeadOnly(embeddings=self.embeddings)

    def __init__(self, *, embeddings: Literal["frozen", "backprop"] = "frozen") -> None:
        self.embeddings = embeddings

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        names = [name for name, origin in self.manifest(model).items() if origin != "frozen"]
        readout_alone = model.embedding_names.isdisjoint(names)
        if readout_alone:

            def forward(tokens: Tensor) -> Tensor:
                with torch.no_grad():
                    hidden = model.features(tokens)
                return model.readout(hidden)

        else:
            forward = model

        signal = differentiate(model, batch, weights, objective, names, forward)
        forward_flops = model.forward_flops(*batch.inputs.shape)
        backward_flops = forward_flops.head + (forward_flops.head if readout_alone else forward_flops.input_gradients)
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
        return origins | frozen(model)
