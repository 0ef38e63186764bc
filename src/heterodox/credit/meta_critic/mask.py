"""SparseMask: the units of largest score are kept, the others 0; backwards the kept ones pass, the others do not.

The straight-through estimator of the source is that derivative: the choice of units is taken for a constant.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def units_kept(density: float, units: int) -> int:
    """How many of `units` a density keeps: rounded down, so 0 where not one is due."""
    return int(density * units + 1e-9)


@torch.no_grad()
def largest(scores: Float[Tensor, "*lead units"], keep: int) -> Bool[Tensor, "*lead units"]:
    """True for the `keep` largest scores along the last dimension; exactly so many, ties broken by place."""
    index = scores.topk(keep, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)
