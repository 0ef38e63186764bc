"""Which examples count: the filter that ratings share, and the ratings that need no training."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from heterodox.core import slot as config
from heterodox.core.comm import Comm, Solo
from heterodox.core.errors import CheckpointError
from heterodox.core.protocols import LanguageModel, Stateless
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.core.state import Tree
from heterodox.core.types import Batch, Cost

# What all ratings' sections have in common.


KEEP = 0.7
"""The share that is kept by default."""


def num_drawn(batch_size: int, keep: float) -> int:
    """How many examples to draw so that the share `keep` of them is a batch."""
    return math.ceil(batch_size / keep)


class RatingConfig(config.Config):
    """A rating that keeps every example."""

    def drawn(self, batch_size: int) -> int:
        """How many examples to draw so that `batch_size` of them are learned from."""
        return batch_size


class FilterConfig(RatingConfig):
    """A rating that keeps the best `keep` of a batch drawn larger."""

    keep: float = Field(KEEP, gt=0, le=1, description="share of the examples drawn that is learned from, the best")

    def drawn(self, batch_size: int) -> int:
        return num_drawn(batch_size, self.keep)


# Keeping the best of a batch that was drawn larger: what ratings that score examples share.


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


class Uniform(Stateless):
    """Every example counts the same.

    Weight 1 for each example.
    """

    class Config(RatingConfig):
        name: Literal["uniform"] = "uniform"

        def build(self) -> "Uniform":
            return Uniform()

    def weights(self, batch: Batch) -> Float[Tensor, " batch"]:
        return torch.ones(batch.ids.shape, device=batch.inputs.device)


class Random(Filter):
    """Keep a random share of each batch: what filtering does where scores say nothing.

    It trains on as many examples as any other filter and drops as many: what another filter gains, it must gain over
    this.

    Scores from the run's random streams, new ones for each batch.
    """

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


class Perplexity(Stateless, Filter):
    """Keep what the model finds easy: the usual filter of noisy text.

    Scores are minus the losses of the model being trained (or, with a margin at either end, of the middle: `skip` drops
    the easiest share first). Where noise is easy, as boilerplate and copies are, it keeps the noise.

    Minus the cross-entropy of each example under the model as it is now, dropout off.
    """

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
