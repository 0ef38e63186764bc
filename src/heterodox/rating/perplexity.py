"""Keep what the model finds easy: the usual filter of noisy text.

Scores are minus the losses of the model being trained (or, with a margin at either end, of the middle: `skip` drops the
easiest share first). Where noise is easy, as boilerplate and copies are, it keeps the noise.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from heterodox.core.protocols import LanguageModel, Stateless
from heterodox.core.services import Services
from heterodox.core.types import Batch
from heterodox.rating.base import FilterConfig
from heterodox.rating.filtering import Filter


class Perplexity(Stateless, Filter):
    """Minus the cross-entropy of each example under the model as it is now, dropout off."""

    class Config(FilterConfig):
        name: Literal["perplexity"] = "perplexity"
        skip: float = Field(0.0, ge=0, lt=1, description="share of a batch that is dropped for being too easy")

        @model_validator(mode="after")
        def _leaves_enough(self) -> "Perplexity.Config":
            check_skip(self.keep, self.skip)
            return self

        def build(self) -> "Perplexity":
            return Perplexity(keep=self.keep, skip=self.skip)

    model: LanguageModel

    def __init__(self, *, keep: float = 0.7, skip: float = 0.0) -> None:
        super().__init__(keep=keep)
        check_skip(keep, skip)
        self.skip = skip

    def connect(self, services: Services) -> None:
        super().connect(services)
        self.model = services.model

    @torch.no_grad()
    def score(self, batch: Batch) -> Float[Tensor, " batch"]:
        training = self.model.training
        self.model.eval()
        logits = self.model(batch.inputs).flatten(0, 1)
        self.model.train(training)
        wide = logits if logits.dtype.itemsize >= 4 else logits.float()
        losses = torch.nn.functional.cross_entropy(wide, batch.targets.flatten(), reduction="none")
        scores = -losses.view(batch.targets.shape).mean(dim=1)
        if not self.skip:
            return scores
        everyone = self.comm.gather(scores)
        easiest = everyone.quantile(1 - self.skip)
        return torch.where(scores > easiest, scores - everyone.max() + everyone.min() - 1, scores)

    def flops(self, batch: Batch) -> int:
        return self.model.forward_flops(*batch.inputs.shape).total


def check_skip(keep: float, skip: float) -> None:
    """Raises `ValueError` where the two shares are more than a batch."""
    if keep + skip > 1 + 1e-9:
        raise ValueError(
            f"skip {skip:g} and keep {keep:g} are more than a batch together: what was skipped would be kept; lower "
            f"skip to {1 - keep:g} or less"
        )
