"""How many connections each layer gets, in integers that sum exactly to what the whole network may have.

- `uniform`: the same density everywhere.
- `erk` (Erdős–Rényi kernel): density ∝ (fan_in + fan_out) / (fan_in · fan_out), so that small layers are denser;
  a layer that would be more than dense is dense, and the others share the rest.

Reference: Evci, Gale, Menick, Castro and Elsen, "Rigging the lottery: making all tickets winners", ICML 2020.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from heterodox.core.errors import RecipeError

Distribution = Literal["uniform", "erk"]


def num_active(sparsity: float, total: int) -> int:
    """Connections that remain of `total` at this sparsity."""
    return round((1 - sparsity) * total)


def distribute(
    shapes: Mapping[str, torch.Size],
    sparsity: float,
    distribution: Distribution,
    lower: Sequence[int] | None = None,
    upper: Sequence[int] | None = None,
) -> list[int]:
    """Active connections of each matrix, within `lower` and `upper` (default: 1 and all).

    Raises `RecipeError` where the bounds, or one connection a layer, cannot meet the count of the whole.
    """
    sizes = [shape.numel() for shape in shapes.values()]
    total = num_active(sparsity, sum(sizes))
    if total < len(sizes):
        raise RecipeError(
            f"update.sparsity {sparsity} leaves {total} of {sum(sizes)} connections for {len(sizes)} layers; "
            "each needs at least one"
        )
    lower, upper = lower or [1] * len(sizes), upper or sizes
    if not sum(lower) <= total <= sum(upper):
        raise RecipeError(
            f"the layers' bounds allow {sum(lower)} to {sum(upper)} connections, but update.sparsity {sparsity} asks "
            f"for {total} of {sum(sizes)}; move update.topology.bounds or the sparsity"
        )
    weights = [sum(shape) if distribution == "erk" else shape.numel() for shape in shapes.values()]
    return _proportional(weights, total, lower, upper)


def _proportional(weights: Sequence[int], total: int, lower: Sequence[int], upper: Sequence[int]) -> list[int]:
    """Integers between the bounds, summing to `total`, as nearly proportional to `weights` as these allow."""

    def shares(scale: float) -> list[float]:
        limits = zip(weights, lower, upper, strict=True)
        return [float(min(max(scale * weight, low), high)) for weight, low, high in limits]

    below, above = 0.0, max(high / weight for weight, high in zip(weights, upper, strict=True))
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(shares(middle)) < total else (below, middle)
    exact = shares(above)
    counts = [int(share) for share in exact]
    by_rest = sorted(range(len(counts)), key=lambda layer: counts[layer] - exact[layer])
    while (missing := total - sum(counts)) > 0:
        for layer in [layer for layer in by_rest if counts[layer] < upper[layer]][:missing]:
            counts[layer] += 1
    while (surplus := sum(counts) - total) > 0:
        for layer in [layer for layer in reversed(by_rest) if counts[layer] > lower[layer]][:surplus]:
            counts[layer] -= 1
    return counts
