"""What a rating makes of a batch, whatever kind of rating it is."""

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.extensions import Costly, Preparing, Selecting
from heterodox.core.protocols import Rating
from heterodox.core.types import Batch, Cost, Diagnosis


def rate(rating: Rating, batch: Batch) -> tuple[Batch, Float[Tensor, " kept"]]:
    """What of `batch` is learned from, and how much each example counts."""
    if isinstance(rating, Selecting):
        batch = rating.select(batch)
    return batch, rating.weights(batch)


def unrated(rating: Rating, batch: Batch) -> tuple[Batch, Float[Tensor, " kept"]]:
    """As many examples of `batch` as are learned from, each with weight 1, without asking the rating."""
    if isinstance(rating, Selecting):
        size = rating.kept(len(batch.ids))
        batch = Batch(batch.inputs[:size], batch.targets[:size], batch.ids[:size])
    return batch, torch.ones(batch.ids.shape, device=batch.inputs.device)


def cost(rating: Rating, drawn: Batch) -> Cost:
    """What rating the examples that were drawn costs."""
    return rating.cost(drawn) if isinstance(rating, Costly) else Cost()


def upfront(rating: Rating) -> Cost:
    """What it does once, before the first step."""
    return rating.upfront() if isinstance(rating, Preparing) else Cost()


def held_bytes(rating: Rating, batch: Batch) -> int:
    """What it holds in doing so."""
    return rating.held_bytes(batch) if isinstance(rating, Preparing) else 0


def diagnose(rating: Rating) -> Diagnosis:
    """What went wrong in that."""
    return rating.diagnose() if isinstance(rating, Preparing) else Diagnosis()


def prepare(rating: Rating) -> bool:
    """Do a piece of what comes before the first step; return whether there is more."""
    return rating.prepare() if isinstance(rating, Preparing) else False


def prepared_whole(rating: Rating) -> bool:
    """Return whether this is a good moment for a checkpoint of that."""
    return rating.prepared_whole if isinstance(rating, Preparing) else True
