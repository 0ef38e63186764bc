"""Mutations: exactly as many connections come as go, and no layer leaves its bounds.

What a child drops and grows is drawn in a random order; an item that would take its layer past a bound is passed over,
and the next one is drawn in its place. Growth anywhere takes nothing that was just dropped. Growth by the signal,
within layers, may: such a connection stays as it is, as in RigL, and the swap is smaller by it.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from heterodox.core import slot as config
from heterodox.core.services import Batches
from heterodox.core.state import Tree
from heterodox.core.types import Batch
from heterodox.update.sparse.masks import Masks, largest, within_caps

# How sparse a layer may become, and the widening of that for layers where nothing moves.
#
# A layer whose gradient activity stays below a threshold for some events in a row may become sparser by a share of its
# size, up to a cap above the network's sparsity. The count of the whole network never changes: what a dead layer gives
# up grows elsewhere. (With the source's numbers, at most 95 % and a cap of 5 points above 80 or 90 %, the cap is never
# above what is allowed anyway; it matters where `max_sparsity` is lower.)


class BoundsOptions(config.Config):
    """Least and greatest sparsity of a layer."""

    min_sparsity: float = Field(0.5, ge=0, lt=1, description="of any layer")
    max_sparsity: float = Field(0.95, gt=0, lt=1, description="of any layer, at the beginning")
    dead_below: float = Field(1e-4, ge=0, description="gradient activity below which a layer counts as dead")
    dead_events: int = Field(10, ge=1, description="events in a row before a dead layer's bound is widened")
    widen: float = Field(0.05, ge=0, le=1, description="share of its weights that it may then do without besides")
    cap: float = Field(0.05, ge=0, le=1, description="sparsity above the network's that widening may reach")

    @model_validator(mode="after")
    def _in_order(self) -> "BoundsOptions":
        if self.min_sparsity > self.max_sparsity:
            raise ValueError(f"min_sparsity {self.min_sparsity} is above max_sparsity {self.max_sparsity}")
        return self

    def complaints(self, sparsity: float) -> list[str]:
        """What is wrong with these bounds for a network of this sparsity."""
        if sparsity == 0 or self.min_sparsity <= sparsity <= self.max_sparsity:
            return []
        return [
            f"update.sparsity {sparsity} lies outside of what update.topology.bounds allow to every layer, "
            f"{self.min_sparsity} to {self.max_sparsity}: the global count cannot be met"
        ]


class Bounds:
    """Least and most connections of each layer, as numbers."""

    def __init__(self, options: BoundsOptions, sizes: list[int], sparsity: float) -> None:
        self.options = options
        self.sizes = sizes
        self.lower = [max(1, math.ceil((1 - options.max_sparsity) * size - 1e-9)) for size in sizes]
        most = [math.floor((1 - options.min_sparsity) * size + 1e-9) for size in sizes]
        self.upper = [max(low, high) for low, high in zip(self.lower, most, strict=True)]  # at least one in each
        cap = min(sparsity + options.cap, 1.0)
        self._floor = [max(1, math.ceil((1 - cap) * size - 1e-9)) for size in sizes]
        self.dead = [0] * len(sizes)

    def note(self, activities: list[float]) -> list[int]:
        """Take in each layer's gradient activity; the layers whose bound has been widened now."""
        widened = []
        for layer, activity in enumerate(activities):
            self.dead[layer] = self.dead[layer] + 1 if activity < self.options.dead_below else 0
            if self.dead[layer] < self.options.dead_events:
                continue
            self.dead[layer] = 0
            step = round(self.options.widen * self.sizes[layer])
            lower = max(self.lower[layer] - step, min(self._floor[layer], self.lower[layer]))
            if lower < self.lower[layer]:
                self.lower[layer] = lower
                widened.append(layer)
        return widened

    def state(self) -> Tree:
        return {"lower": self.lower, "dead": self.dead}

    def load_state(self, tree: Tree) -> None:
        self.lower, self.dead = list(tree["lower"]), list(tree["dead"])


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


# The composite score of a candidate: lower is better.
#
#     P = w_CE · z(CE) + w_div · z(D) − w_act · z(A),   z(x) = (x − μ) / (σ + ε)
#
# - CE: cross-entropy on the micro-batch.
# - D, how far the layers' densities are from the network's: `rms`, √(mean_l (d_l − d)²), or `kl`, Σ_l s_l ln(s_l / s)
#   over sparsities. (The source subtracts a sparsity from a density; we compare like with like.)
# - A, gradient activity: mean_l ‖g_l ⊙ M_l‖ / √(active connections of l).
#
# μ and σ follow the winners' values exponentially; they begin as those of the first generation. w_div and w_act fall to
# 0 with the square of the events that are left, within a share of all events.


EPSILON = 1e-5
PARTS = ("ce", "diversity", "activity")


class ProxyOptions(config.Config):
    """Weights of the score's parts, and how they change."""

    ce: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    diversity: float = Field(0.01, ge=0, description="weight of the layers' unevenness, in the first event")
    activity: float = Field(0.005, ge=0, description="weight of gradient activity, in the first event")
    form: Literal["rms", "kl"] = Field("rms", description="how unevenness is measured")
    anneal: float = Field(0.7, gt=0, le=1, description="share of the events after which only cross-entropy counts")
    decay: float = Field(0.99, ge=0, lt=1, description="of the running mean and variance")


class Proxy:
    """Running statistics and the scores made with them."""

    def __init__(self, options: ProxyOptions) -> None:
        self.options = options
        self.mean: dict[str, float] = {}
        self.variance: dict[str, float] = {}

    def weights(self, done: float) -> dict[str, float]:
        """The parts' weights when a share `done` of all events is over."""
        left = max(0.0, 1 - done / self.options.anneal) ** 2
        return {
            "ce": self.options.ce,
            "diversity": self.options.diversity * left,
            "activity": self.options.activity * left,
        }

    def score(self, candidates: list[dict[str, Any]], done: float) -> None:
        """Write `z` and `score` into each candidate that is finite; the others get infinity."""
        finite = [candidate for candidate in candidates if candidate["finite"]]
        if not self.mean and finite:
            for part in PARTS:
                values = [candidate[part] for candidate in finite]
                self.mean[part] = sum(values) / len(values)
                self.variance[part] = sum((value - self.mean[part]) ** 2 for value in values) / len(values)
        weights = self.weights(done)
        for candidate in candidates:
            candidate["z"], candidate["score"] = None, math.inf
            if candidate["finite"]:
                z = {
                    part: (candidate[part] - self.mean[part]) / (math.sqrt(self.variance[part]) + EPSILON)
                    for part in PARTS
                }
                candidate["z"] = z
                candidate["score"] = sum((-1 if part == "activity" else 1) * weights[part] * z[part] for part in PARTS)

    def follow(self, winner: dict[str, Any]) -> None:
        """Let mean and variance follow the winner's values."""
        if not winner["finite"]:
            return
        rate = 1 - self.options.decay
        for part in PARTS:
            away = winner[part] - self.mean[part]
            self.mean[part] += rate * away
            self.variance[part] += rate * (away * away - self.variance[part])

    def state(self) -> Tree:
        return {"mean": self.mean, "variance": self.variance}

    def load_state(self, tree: Tree) -> None:
        self.mean, self.variance = dict(tree["mean"]), dict(tree["variance"])


def unevenness(counts: list[int], sizes: list[int], form: Literal["rms", "kl"]) -> float:
    """How far the layers' densities (`rms`) or sparsities (`kl`) are from the network's."""
    density = sum(counts) / sum(sizes)
    densities = [count / size for count, size in zip(counts, sizes, strict=True)]
    if form == "rms":
        return math.sqrt(sum((here - density) ** 2 for here in densities) / len(sizes))
    return sum((1 - here) * math.log((1 - here) / (1 - density)) for here in densities if here < 1)


def layer_activities(signal: Float[Tensor, " entries"], mask: Tensor, sizes: list[int]) -> Float[Tensor, " layers"]:
    """‖g_l ⊙ M_l‖ / √active_l of each layer; 0 for one without connections."""
    parts = zip((signal * mask).split(sizes), mask.split(sizes), strict=True)
    return torch.stack([part.norm() / active.sum().clamp(min=1).sqrt() for part, active in parts])


# Micro-batches that are there when they are needed: on CUDA the next one is copied while the model trains.


class Prefetch:
    """Batches fetched one ahead on a stream of their own (from pinned memory); on a CPU, simply batches.

    The state is that of the batches handed out, not of the one that waits.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches = batches
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waiting: tuple[Tree, Batch] | None = None

    @property
    def examples_per_epoch(self) -> int:
        return self.batches.examples_per_epoch

    def next_batch(self) -> Batch:
        if self._stream is None:
            return self.batches.next_batch()
        if self._waiting is None:
            self.fetch()
        assert self._waiting is not None
        _, batch = self._waiting
        self._waiting = None
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        for tensor in (batch.inputs, batch.targets, batch.ids):
            tensor.record_stream(torch.cuda.current_stream(self._stream.device))
        return batch

    def fetch(self) -> None:
        """Begin to fetch the next batch, if none waits."""
        if self._stream is None or self._waiting is not None:
            return
        before = self.batches.state()
        with torch.cuda.stream(self._stream):
            self._waiting = before, self.batches.next_batch()

    def state(self) -> Tree:
        return self.batches.state() if self._waiting is None else self._waiting[0]

    def load_state(self, tree: Tree) -> None:
        self._waiting = None
        self.batches.load_state(tree)
