"""Mutations: exactly as many connections come as go, and no layer leaves its bounds.

What a child drops and grows is drawn in a random order; an item that would take its layer past a bound is passed over,
and the next one is drawn in its place. Growth anywhere takes nothing that was just dropped. Growth by the signal,
within layers, may: such a connection stays as it is, as in RigL, and the swap is smaller by it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heterodox.update.sparse.masks import Masks, largest, within_caps
from heterodox.update.sparse.sparsae.bounds import Bounds


@dataclass(frozen=True)
class Swap:
    """Flat positions of the connections that go and of those that come, equally many."""

    dropped: Int[Tensor, " n"]
    grown: Int[Tensor, " n"]


@dataclass(frozen=True)
class Pools:
    """Flat positions that children choose among: the favoured ones, and all that are possible, of either kind."""

    droppable: Int[Tensor, " active"]
    growable: Int[Tensor, " inactive"]
    drop_first: Int[Tensor, " n"] | None = None
    grow_first: Int[Tensor, " m"] | None = None


def pools(masks: Masks, drop_first: Tensor | None = None, grow_first: Tensor | None = None) -> Pools:
    """All that may be dropped and grown, and what is favoured."""
    return Pools(masks.flat.nonzero().squeeze(1), (~masks.flat).nonzero().squeeze(1), drop_first, grow_first)


def favoured(
    appeal: Float[Tensor, " entries"], among: Bool[Tensor, " entries"], masks: Masks, counts: int | list[int]
) -> Int[Tensor, " n"]:
    """Positions of the entries with the most appeal among those marked: so many of all layers together, or of each."""
    if isinstance(counts, int):
        return largest(appeal, among, min(counts, int(among.sum())))
    pieces = zip(masks.starts, appeal.split(masks.sizes), among.split(masks.sizes), counts, strict=True)
    return torch.cat(
        [start + largest(values, marked, min(count, int(marked.sum()))) for start, values, marked, count in pieces]
    )


def relative_size(weights: Float[Tensor, " entries"], masks: Masks) -> Float[Tensor, " entries"]:
    """|w| over the root mean square of its layer's connections, so that layers of any scale compare."""
    flat = weights.abs()
    pieces = zip(flat.split(masks.sizes), masks.flat.split(masks.sizes), strict=True)
    scaled = [size * (active.sum() / (size * active).square().sum().clamp(min=1e-30)).sqrt() for size, active in pieces]
    return torch.cat(scaled)


def relative_signal(signal: Float[Tensor, " entries"], masks: Masks) -> Float[Tensor, " entries"]:
    """|g| over the root mean squares of its row and of its column, so that no unit draws all connections to itself."""
    pieces = []
    for matrix in masks.split(signal).values():
        square = matrix.square()
        rows, columns = square.mean(dim=1, keepdim=True), square.mean(dim=0, keepdim=True)
        pieces.append((matrix.abs() / (rows * columns).sqrt().clamp(min=1e-30)).flatten())
    return torch.cat(pieces)


def swap(masks: Masks, bounds: Bounds, chosen: Pools, count: int, generator: torch.Generator) -> Swap:
    """Draw a swap of `count` connections, or of as many as the bounds allow."""
    active = masks.counts()
    drop_order = _order(chosen.drop_first, chosen.droppable, generator)
    grow_order = _order(chosen.grow_first, chosen.growable, generator)
    while True:
        spare = [have - low for have, low in zip(active, bounds.lower, strict=True)]
        dropped = _take(masks, drop_order, spare, count, chosen.droppable, generator)
        gone = masks.count(dropped)
        room = [high - have + less for high, have, less in zip(bounds.upper, active, gone, strict=True)]
        grown = _take(masks, grow_order, room, count, chosen.growable, generator)
        if len(dropped) == len(grown):
            return Swap(dropped, grown.sort().values)
        count = min(len(dropped), len(grown))


def swap_in_layers(masks: Masks, chosen: Pools, quotas: list[int], generator: torch.Generator) -> Swap:
    """Draw a swap of so many connections in every layer, or of as many as it has and lacks; no layer's count moves.

    What is favoured for growth may include favoured drops, if all of these are drawn: what is drawn for both stays.
    """
    pairs = zip(quotas, masks.counts(), masks.sizes, strict=True)
    quotas = [min(quota, active, size - active) for quota, active, size in pairs]
    dropped = _some_of_each(
        masks, chosen.droppable if chosen.drop_first is None else chosen.drop_first, quotas, generator
    )
    grown = _some_of_each(masks, chosen.growable if chosen.grow_first is None else chosen.grow_first, quotas, generator)
    stays = masks.flat[grown]
    return Swap(dropped[~torch.isin(dropped, grown[stays])], grown[~stays].sort().values)


def _some_of_each(masks: Masks, items: Tensor, quotas: list[int], generator: torch.Generator) -> Int[Tensor, " n"]:
    """At random, so many of each layer's items, which stand layer by layer."""
    layers = zip(items.split(masks.count(items)), quotas, strict=True)
    return torch.cat([_shuffled(inside, generator)[:quota] for inside, quota in layers])


def most(masks: Masks, bounds: Bounds) -> int:
    """The most connections that one swap can exchange within the bounds."""
    active = masks.counts()
    spare = sum(have - low for have, low in zip(active, bounds.lower, strict=True))
    return min(spare, masks.size - sum(active))


def _order(first: Tensor | None, all_: Tensor, generator: torch.Generator) -> Tensor:
    """The order in which items are offered: the favoured ones, or all, shuffled."""
    return _shuffled(all_ if first is None else first, generator)


def _shuffled(items: Tensor, generator: torch.Generator) -> Tensor:
    return items[torch.randperm(len(items), generator=generator).to(items.device)]


def _take(
    masks: Masks, order: Tensor, caps: list[int], count: int, all_: Tensor, generator: torch.Generator
) -> Int[Tensor, " n"]:
    """The first `count` items that fit under their layers' caps; if the favoured ones do not suffice, others too."""
    for offered in (order[: 2 * count], order):  # what fits does not depend on what comes later
        fits = offered[within_caps(masks.layers(offered), caps)]
        if len(fits) >= count:
            break
    if len(fits) < count and len(order) < len(all_):
        favoured = torch.zeros(masks.size, dtype=torch.bool, device=order.device)
        favoured[order] = True
        others = _shuffled(all_[~favoured[all_]], generator)
        order = torch.cat([order, others])
        fits = order[within_caps(masks.layers(order), caps)]
    return fits[:count]


def apply_swap(flat: Bool[Tensor, " entries"], change: Swap) -> Bool[Tensor, " entries"]:
    """The mask after the swap."""
    new = flat.clone()
    new[change.dropped] = False
    new[change.grown] = True
    return new
