"""Masks: which entries of which matrices exist, in one flat vector with a view for each layer."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.rng import Streams
from heterodox.core.state import restore


class Masks:
    """Boolean masks over named matrices. `flat` holds all of them end to end, `views` each in its matrix's shape."""

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device | str = "cpu") -> None:
        self.shapes = dict(shapes)
        self.sizes = [shape.numel() for shape in shapes.values()]
        ends = list(itertools.accumulate(self.sizes))
        self.starts = [0, *ends[:-1]]
        self.size = ends[-1]
        self.flat: Bool[Tensor, " entries"] = torch.ones(self.size, dtype=torch.bool, device=device)
        self._ends = torch.tensor(ends, device=device)

    @property
    def names(self) -> list[str]:
        return list(self.shapes)

    @property
    def views(self) -> dict[str, Tensor]:
        return self.split(self.flat)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector, by name, in the shapes of the matrices."""
        pieces = flat.split(self.sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def draw(self, counts: Iterable[int], streams: Streams) -> None:
        """Draw each layer's mask at random, with so many connections."""
        for (name, view), count in zip(self.views.items(), counts, strict=True):
            drawn = torch.rand(view.shape, generator=streams.generator("rule", "mask", name))
            kept = drawn.flatten().topk(count).indices.to(view.device)
            view.view(-1).fill_(False)[kept] = True

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The matrices' entries end to end, as a new vector; zeros for those that `tensors` lacks."""
        like = next(iter(tensors.values())) if tensors else self.flat.float()
        return torch.cat(
            [
                tensors[name].detach().reshape(-1) if name in tensors else like.new_zeros(size)
                for name, size in zip(self.shapes, self.sizes, strict=True)
            ]
        )

    def layers(self, entries: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The number of the layer that each of these flat positions lies in."""
        return torch.bucketize(entries, self._ends, right=True)

    def count(self, entries: Int[Tensor, " n"]) -> list[int]:
        """How many of these flat positions lie in each layer."""
        return torch.bincount(self.layers(entries), minlength=len(self.sizes)).tolist()

    def counts(self, flat: Bool[Tensor, " entries"] | None = None) -> list[int]:
        """Active connections of each layer."""
        pieces = (self.flat if flat is None else flat).split(self.sizes)
        return torch.stack([piece.sum() for piece in pieces]).tolist()

    def load(self, views: Mapping[str, Tensor], active: int) -> None:
        """Take over the masks of a checkpoint. Raises `CheckpointError` where they do not have so many connections."""
        restore(self.views, views, "mask of")
        if (found := sum(self.counts())) != active:
            raise CheckpointError(
                f"the checkpoint's masks hold {found} connections, but it says {active}: it is damaged"
            )

    def checksum(self) -> int:
        """A number that two masks share only if they are equal."""
        digest = hashlib.sha256(self.flat.cpu().numpy().tobytes()).digest()
        return int.from_bytes(digest[:6], "big")

    def dead(self) -> dict[str, tuple[int, int]]:
        """For each matrix: output units without any incoming connection, input units without any outgoing one."""
        return {
            name: (int((~view.any(dim=1)).sum()), int((~view.any(dim=0)).sum())) for name, view in self.views.items()
        }


def within_caps(layers: Int[Tensor, " n"], caps: Iterable[int]) -> Bool[Tensor, " n"]:
    """Of items in order of preference, those that come before their layer's cap is reached."""
    order = torch.argsort(layers, stable=True)
    grouped = layers[order]
    first = torch.searchsorted(grouped, grouped)
    rank = torch.empty_like(layers)
    rank[order] = torch.arange(len(layers), device=layers.device) - first
    return rank < torch.tensor(list(caps), device=layers.device)[layers]


def smallest(values: Float[Tensor, " entries"], among: Bool[Tensor, " entries"], count: int) -> Int[Tensor, " count"]:
    """Positions of the `count` smallest values among those marked."""
    return values.masked_fill(~among, torch.inf).topk(count, largest=False).indices


def largest(values: Float[Tensor, " entries"], among: Bool[Tensor, " entries"], count: int) -> Int[Tensor, " count"]:
    """Positions of the `count` largest values among those marked."""
    return values.masked_fill(~among, -torch.inf).topk(count).indices


# How many connections each layer gets, in integers that sum exactly to what the whole network may have.
#
# - `uniform`: the same density everywhere.
# - `erk` (Erdős–Rényi kernel): density ∝ (fan_in + fan_out) / (fan_in · fan_out), so that small layers are denser;
#   a layer that would be more than dense is dense, and the others share the rest.
#
# Reference: Evci, Gale, Menick, Castro and Elsen, "Rigging the lottery: making all tickets winners", ICML 2020.


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
