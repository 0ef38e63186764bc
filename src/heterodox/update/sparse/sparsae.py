"""Sparsae: every so often an evolution strategy of one parent and λ children looks for a better mask.

    children: M with as many connections dropped as grown     winner: the lowest P on a micro-batch of the meta split

A child drops connections (any, or the smallest of its layer) and grows as many (any, or among those whose signal is
largest), in each layer or across layers within bounds on their sparsity; the share that it swaps falls along a cosine.
All candidates are scored on the same micro-batch, dropout off, by a composite of cross-entropy, unevenness and gradient
activity (`proxy.py`); one that is not finite loses. Now and then a child is a reset on a large scale, more often when
the run stagnates.

As the source has it (`judge: at_once`, `signal: micro_batch`, `drop: uniform`, `grow: uniform`, `scope: global`,
`survival: plus`, `margin: 0`, a constant share, `new_weights: he`), a child is scored before its new connections have
learnt anything, and the parent wins nearly always. By default a candidate is judged after a step that all of them take,
the parent too: along the signal of the training step, `reach` times as long as the inner update's own (`judge:
look_ahead`). A short step shows what new connections can do for the loss. In a long one those that grow where the
signal is largest overshoot together, and lose; but that passes, and what they can do stays. And the parent gives way to
the best child (`survival: comma`), since no candidate can show within a step what it is worth to have moved at all; the
best is the first, which grows where the signal is largest, unless another leads it by more than chance (`margin`). A
child costs one forward pass; no backward pass is made for the search. The signal is the credit rule's, so that under
another rule than backpropagation no gradient is smuggled in. `selection: random` is the control: the same children, the
same costs, and a random winner.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from heterodox.core import slot as config
from heterodox.core.errors import RecipeError
from heterodox.core.protocols import Window
from heterodox.core.services import Batches, LearnableSplit, Services, no_supply
from heterodox.core.state import Tree
from heterodox.core.types import Batch
from heterodox.update.sparse.children import (
    Bounds,
    BoundsOptions,
    Pools,
    Prefetch,
    Proxy,
    ProxyOptions,
    Swap,
    apply_swap,
    favoured,
    layer_activities,
    most,
    pools,
    relative_signal,
    relative_size,
    swap,
    swap_in_layers,
    unevenness,
)
from heterodox.update.sparse.masks import Distribution, Masks, distribute
from heterodox.update.sparse.topology import Change, DecayingSchedule, Sight, Topology, require_one

# Global resets: now and then a child that is changed on a large scale, more often when nothing gets better.
#
# Stagnation is measured on a batch of its own, the same one in every event: no new lowest loss for `patience` events
# boosts the probability for the next `boosts` events.


class ResetOptions(config.Config):
    """How often a child is a reset, and how large one is."""

    probability: float = Field(0.01, ge=0, le=1, description="that a child is a reset")
    boosted: float = Field(0.1, ge=0, le=1, description="the same while the run stagnates")
    boosts: int = Field(2, ge=0, description="events for which a stagnation boosts it")
    patience: int = Field(5, ge=1, description="events without a new lowest loss that make a stagnation")
    factor: float = Field(3.0, ge=1, description="times as many connections as an ordinary child swaps, anywhere")
    fraction: float | None = Field(
        None, gt=0, le=1, description="instead: this share of the connections, however few a child swaps by then"
    )
    batch: int = Field(32, ge=1, description="windows of the meta split that stagnation is measured on")

    def count(self, child: int, every: int) -> int:
        """Return how many connections a reset swaps, of `every`, where an ordinary child swaps `child`."""
        if self.fraction is not None:
            return round(self.fraction * every)
        return min(round(self.factor * child), every)


class Resets:
    """Whether the run stagnates."""

    def __init__(self, options: ResetOptions) -> None:
        self.options = options
        self.best = math.inf
        self.waited = 0
        self.boosts_left = 0

    @property
    def probability(self) -> float:
        """That a child of the coming event is a reset."""
        return self.options.boosted if self.boosts_left else self.options.probability

    def event_over(self) -> None:
        """One of the boosted events has passed."""
        self.boosts_left = max(self.boosts_left - 1, 0)

    def note(self, loss: float) -> bool:
        """Take in the loss after an event; whether the run stagnates now."""
        if loss < self.best:
            self.best, self.waited = loss, 0
            return False
        self.waited += 1
        if self.waited < self.options.patience:
            return False
        self.waited, self.boosts_left = 0, self.options.boosts
        return True

    def state(self) -> Tree:
        best = self.best if math.isfinite(self.best) else None
        return {"best": best, "waited": self.waited, "boosts_left": self.boosts_left}

    def load_state(self, tree: Tree) -> None:
        self.best = math.inf if tree["best"] is None else tree["best"]
        self.waited, self.boosts_left = tree["waited"], tree["boosts_left"]


# The options of Sparsae.


Selection = Literal["proxy", "ce_only", "random"]
Growth = Literal["uniform", "activity", "relative", "mixed"]
Scope = Literal["layer", "global", "mixed"]


class SparsaeOptions(DecayingSchedule):
    """When, how many, how far, and how they are judged."""

    name: Literal["sparsae"] = "sparsae"
    children: int = Field(4, ge=0, description="candidates in an event besides the mask that is there, λ; 0: static")
    survival: Literal["plus", "comma"] = Field(
        "comma", description="whether the parent competes, (1 + λ), or gives way to a child in every event, (1, λ)"
    )
    mutation: float = Field(0.3, gt=0, le=1, description="share of the connections that a child swaps")
    scope: Scope = Field(
        "layer", description="where: the same share of every layer, anywhere within the bounds, or the two in turn"
    )
    drop: Literal["uniform", "magnitude"] = Field(
        "magnitude", description="what a child drops: any connection, or the smallest for their layer"
    )
    grow: Growth = Field(
        "mixed",
        description="what it grows: any missing connection, or among those with the largest signal, as it is or "
        "relative to row and column; `mixed`: `activity` and `uniform` in turn",
    )
    pool: float = Field(
        2.0,
        ge=1,
        description="growth by signal, but for the first child of its kind, chooses among so many times what it needs",
    )
    signal: Literal["training", "micro_batch"] = Field(
        "training", description="that of the training step, or of a pass on a micro-batch; for growth and look-ahead"
    )
    judge: Literal["at_once", "look_ahead"] = Field(
        "look_ahead", description="score candidates as they are, or after a step that all of them take"
    )
    reach: float = Field(0.1, gt=0, description="length of that step, in steps of the inner update")
    selection: Selection = Field(
        "proxy", description="who wins: the best composite score, the lowest loss, or chance (the control)"
    )
    margin: float = Field(
        2.0,
        ge=0,
        description="standard errors by which a loss must lie, window by window, below that of the first candidate "
        "that may win, lest that one wins; 0: none",
    )
    micro_batch: int = Field(16, ge=1, description="windows of the meta split that candidates are scored on")
    proxy: ProxyOptions = ProxyOptions()  # pyrefly: ignore[missing-argument]
    reset: ResetOptions = ResetOptions()  # pyrefly: ignore[missing-argument]
    bounds: BoundsOptions = BoundsOptions()  # pyrefly: ignore[missing-argument]

    def refusals(self, recipe: config.Config) -> list[str]:
        reasons = super().refusals(recipe)
        update = recipe.update  # pyrefly: ignore[missing-attribute]
        if self.margin and self.judge == "at_once" and self.signal == "micro_batch":
            reasons.append(
                f"update.topology.margin {self.margin} compares losses window by window, and judge at_once with signal "
                "micro_batch knows their mean alone; set margin: 0"
            )
        if self.margin and self.micro_batch == 1:
            reasons.append(
                f"update.topology.margin {self.margin} is in standard errors over the windows of a micro-batch, and "
                "update.topology.micro_batch is 1; make that at least 2, or set margin: 0"
            )
        return reasons + (self.bounds.complaints(update.sparsity) if self.children else [])


# One event of the search: a parent, its children, and what each of them scores.


GROWTHS = ("activity", "uniform")
SCOPES = ("layer", "global")


class Generation:
    """The candidates of an event; number 0 is the parent.

    `rows` is what the log is told of each: cross-entropy, unevenness, activity, whether all of that is finite. `masks`
    are flat, `values` those of a child's new connections, `activities` by layer.
    """

    def __init__(
        self,
        options: SparsaeOptions,
        sight: Sight,
        window: Window,
        micro: Batches,
        bounds: Bounds,
        reset_probability: float,
    ) -> None:
        self.options, self.sight, self.window, self.bounds = options, sight, window, bounds
        self.reset_probability = reset_probability
        share = options.decayed(options.mutation, sight.step, sight.steps)
        layers = zip(sight.masks.counts(), sight.masks.sizes, strict=True)
        self.quotas = [min(round(share * active), size - active) for active, size in layers]
        self.total = round(share * sum(sight.masks.counts()))
        self.batch = micro.next_batch()
        if options.signal == "training":
            assert sight.signal is not None
            self.signal, losses = sight.signal, None
        else:
            loss, grads = window.signal(self.batch, {})
            losses, self.signal = loss[None], sight.masks.join(grads)
        self.rows: list[dict[str, Any]] = []
        self.losses: list[Float[Tensor, " windows"]] = []
        self.masks: list[Bool[Tensor, " entries"]] = []
        self.values: list[Float[Tensor, " grown"] | None] = []
        self.activities: list[list[float]] = []
        self._known: dict[tuple[str, str, bool], Tensor] = {}
        scratch = sight.weights.clone()
        if options.judge == "look_ahead":
            if options.signal == "micro_batch":
                self.batch = micro.next_batch()  # not the batch that the step is taken on, which would flatter it
            scratch += options.reach * (sight.ahead.present(self.signal) - scratch)
            losses = None
        if losses is None:
            losses = window.losses(self.batch, sight.masks.split(scratch))
        self._add(losses, self.signal, sight.masks.flat.clone(), None, {"swaps": 0, "reset": False, "made": "parent"})
        for number in range(1, options.children + 1):
            self._add_child(number, scratch)

    def _add_child(self, number: int, scratch: Float[Tensor, " entries"]) -> None:
        """Draw a child, write its weights into the parent's, score them, and put the parent's back."""
        sight, options = self.sight, self.options
        generator = sight.generator("child", number)
        reset = bool(torch.rand((), generator=generator) < self.reset_probability) and number > self.favourite
        growth = _in_turn(options.grow, number - 1, GROWTHS)
        scope = _in_turn(options.scope, (number - 1) // len(GROWTHS), SCOPES)
        first = all(row["made"] != f"{growth}, {scope}" for row in self.rows)
        change = self._swap(reset, growth, scope, first, generator)
        born = sight.draw(change.grown, f"child {number}")
        views = sight.masks.split(scratch)
        kept = scratch[change.dropped]
        scratch[change.dropped] = 0
        scratch[change.grown] = born
        if options.judge == "look_ahead":
            step = sight.ahead.newborn(born, self.signal[change.grown]) - born
            scratch[change.grown] += options.reach * step
        if options.judge == "at_once" and options.signal == "micro_batch":
            loss, grads = self.window.signal(self.batch, views)
            losses, signal = loss[None], sight.masks.join(grads)
        else:
            losses, signal = self.window.losses(self.batch, views), self.signal
        scratch[change.dropped] = kept
        scratch[change.grown] = 0
        about = {"swaps": len(change.grown), "reset": reset, "made": "reset" if reset else f"{growth}, {scope}"}
        self._add(losses, signal, apply_swap(sight.masks.flat, change), born, about)

    def _swap(self, reset: bool, growth: str, scope: str, first: bool, generator: torch.Generator) -> Swap:
        masks, bounds = self.sight.masks, self.bounds
        if reset:
            count = self.options.reset.count(self.total, sum(masks.counts()))
            return swap(masks, bounds, self._pools, min(count, most(masks, bounds)), generator)
        drop_first = self._favoured(self.options.drop, scope, True)
        grow_first = self._favoured(growth, scope, first)
        chosen = replace(self._pools, drop_first=drop_first, grow_first=grow_first)
        if scope == "layer":
            return swap_in_layers(masks, chosen, self.quotas, generator)
        return swap(masks, bounds, chosen, min(self.total, most(masks, bounds)), generator)

    @property
    def favourite(self) -> int:
        """The number of the first candidate that may win: the parent, or the first child, which then is no reset."""
        return 0 if self.options.survival == "plus" else 1

    @cached_property
    def _pools(self) -> Pools:
        return pools(self.sight.masks)

    def _favoured(self, kind: str, scope: str, first: bool) -> Tensor | None:
        """What such children drop or grow first; the first of its kind takes the best, others choose from the pool."""
        if kind == "uniform":
            return None
        if (kind, scope, first) not in self._known:
            masks, counts, total = self.sight.masks, self.quotas, self.total
            if kind == "magnitude":
                appeal, among = -relative_size(self.sight.weights, masks), masks.flat
            else:
                appeal = self.signal.abs() if kind == "activity" else relative_signal(self.signal, masks)
                among, pool = ~masks.flat, 1.0 if first else self.options.pool
                counts, total = [math.ceil(pool * quota) for quota in counts], math.ceil(pool * total)
                if scope == "layer" and self.options.drop == "magnitude":
                    among[self._favoured("magnitude", scope, True)] = True  # what goes may come back at once
            chosen = favoured(appeal, among, masks, counts if scope == "layer" else total)
            self._known[kind, scope, first] = chosen
        return self._known[kind, scope, first]

    def _add(self, losses: Tensor, signal: Tensor, flat: Tensor, values: Tensor | None, about: dict[str, Any]) -> None:
        masks = self.sight.masks
        layers = layer_activities(signal, flat, masks.sizes).tolist()
        row = {
            "candidate": len(self.rows),
            **about,
            "ce": float(losses.mean()),
            "diversity": unevenness(masks.counts(flat), masks.sizes, self.options.proxy.form),
            "activity": sum(layers) / len(layers),
        }
        row["finite"] = all(math.isfinite(row[part]) for part in ("ce", "diversity", "activity"))
        row["lead"] = lead(self.losses[self.favourite], losses) if len(self.losses) > self.favourite else None
        self.rows.append(row)
        self.losses.append(losses)
        self.masks.append(flat)
        self.values.append(values)
        self.activities.append(layers)

    def choose(self, selection: Selection) -> int:
        """The number of the winner; the parent where no candidate that may win is finite."""
        rivals = self.rows[self.favourite :]
        finite = [row for row in rivals if row["finite"]] or self.rows[:1]
        if selection == "random":
            winner = finite[int(torch.randint(len(finite), (), generator=self.sight.generator("winner")))]
        else:
            key, margin = "score" if selection == "proxy" else "ce", self.options.margin
            if margin and finite[0] is rivals[0]:
                finite = [row for row in finite if row is rivals[0] or (row["lead"] or 0.0) > margin]
            winner = min(finite, key=lambda row: row[key])
        for row in self.rows:
            row["won"] = row is winner
        return winner["candidate"]


def lead(others: Float[Tensor, " windows"], own: Float[Tensor, " windows"]) -> float | None:
    """By how many standard errors the second losses lie below the first, window by window; None for one window."""
    if len(own) < 2:
        return None
    ahead = (others - own).double()
    return float(ahead.mean() / (ahead.std() / len(own) ** 0.5).clamp(min=1e-30))


def _in_turn(choice: str, turn: int, kinds: Sequence[str]) -> str:
    """The kind whose turn it is, counted from 0."""
    return kinds[turn % len(kinds)] if choice == "mixed" else choice


def loggable(value: Any) -> Any:
    """`value` with null for every number that is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: loggable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [loggable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


SPLIT: LearnableSplit = "meta"
COUNTED = ("child_wins", "below_parent", "upsets")
"""Events that a child won; whose winner's loss lay below the parent's; that the first that may win did not win."""


class Sparsae(Topology):
    """A (1, λ) evolution strategy over masks, or (1 + λ) under `survival: plus`."""

    class Config(SparsaeOptions):
        def in_float32(self) -> list[str]:
            return ["the losses and signals that masks are compared by at their events"]

        def build(self) -> "Sparsae":
            return Sparsae(self)

    def __init__(self, options: SparsaeOptions) -> None:
        self.options = options
        self.schedule = options
        self.wants_signal = options.signal == "training" and options.children > 0
        self.proxy, self.resets = Proxy(options.proxy), Resets(options.reset)
        self.events = 0
        self.counts = dict.fromkeys(COUNTED, 0)
        self.bounds: Bounds | None = None
        self._micro: Prefetch | None = None
        self._held_out: Batch | None = None
        self._ranks = 1

    def connect(self, services: Services, masks: Masks) -> None:
        if services.supply is no_supply:
            return
        options, ranks = self.options, services.comm.world_size
        self._ranks = ranks
        for key, size in (("micro_batch", options.micro_batch), ("reset.batch", options.reset.batch)):
            if size % ranks:
                raise RecipeError(f"update.topology.{key} {size} cannot be divided among {ranks} ranks")
        apart = "sparsae stagnation"
        self._held_out = services.supply(SPLIT, options.reset.batch, apart).next_batch()
        ids = services.supply(SPLIT, options.reset.batch, apart, whole=True).next_batch().ids
        micro = services.supply(SPLIT, options.micro_batch, "sparsae candidates", without=ids)
        if options.micro_batch > micro.examples_per_epoch:
            raise RecipeError(
                f"update.topology.micro_batch is {options.micro_batch}, but the {SPLIT} split has "
                f"{micro.examples_per_epoch} windows beside the {options.reset.batch} of update.topology.reset.batch"
            )
        self._micro = Prefetch(micro, masks.flat.device)

    def start(self, masks: Masks, sparsity: float, distribution: Distribution) -> list[int]:
        if sparsity == 0:  # dense: there is nothing to swap
            return list(masks.sizes)
        if not self.options.children:  # static: nothing moves, so nothing is bounded
            return super().start(masks, sparsity, distribution)
        bounds = self.bounds = Bounds(self.options.bounds, masks.sizes, sparsity)
        counts = distribute(masks.shapes, sparsity, distribution, bounds.lower, bounds.upper)
        options = self.options
        if options.scope == "global":
            require_one("mutation", options.mutation, sum(counts), "in all")
        else:
            require_one("mutation", options.mutation, max(counts), "of the largest layer")
        if options.reset.fraction is not None and (options.reset.probability or options.reset.boosted):
            require_one("reset.fraction", options.reset.fraction, sum(counts), "in all")
        return counts

    @property
    def passes(self) -> list[tuple[int, bool]]:
        options = self.options
        if self.bounds is None:
            return []
        own_signal = options.signal == "micro_batch"
        at_once = own_signal and options.judge == "at_once"
        scored = [(options.micro_batch, at_once)] * (1 + options.children)
        step = [(options.micro_batch, True)] * (own_signal and not at_once)
        held_out = [(options.reset.batch, False)]
        return [(examples // self._ranks, signal) for examples, signal in step + scored + held_out]

    def change(self, sight: Sight) -> Change | None:
        if self.bounds is None:
            return None
        window, micro, held_out = sight.window, self._micro, self._held_out
        if window is None or micro is None or held_out is None:
            lacking = "batches of its own (Services.supply)" if window is not None else "a window on its losses (watch)"
            raise RecipeError(
                f"update.topology sparsae scores candidates, and was given a model without {lacking}; train it by a "
                "learner, or take static, magnitude, set or rigl, which need neither"
            )
        proxy, bounds, resets = self.proxy, self.bounds, self.resets
        generation = Generation(self.options, sight, window, micro, bounds, resets.probability)
        proxy.score(generation.rows, done := self.events / max(self.options.num_events(sight.steps), 1))
        winner = generation.choose(self.options.selection)
        self.events += 1
        parent, chosen = generation.rows[0], generation.rows[winner]
        self._count(winner > 0, chosen["ce"] < parent["ce"], winner != generation.favourite)
        proxy.follow(chosen)
        resets.event_over()
        loss = float(window.losses(held_out, {}).mean())
        stagnates = resets.note(loss)
        widened = bounds.note(activity := generation.activities[winner])
        micro.fetch()
        told = {
            "winner": winner, **self.metrics(), "weights": proxy.weights(done),
            "means": dict(proxy.mean), "deviations": {part: math.sqrt(v) for part, v in proxy.variance.items()},
            "stagnation_loss": loss, "stagnates": stagnates, "reset_probability": resets.probability,
            "widened": [sight.masks.names[layer] for layer in widened], "lower": list(bounds.lower),
            "upper": bounds.upper, "layer_activity": activity,
        }  # fmt: skip
        events = [{"kind": "candidate", "event": self.events} | loggable(row) for row in generation.rows]
        return Change(generation.masks[winner], generation.values[winner], loggable(told), events)

    def metrics(self) -> dict[str, float]:
        return {name: count / self.events for name, count in self.counts.items()} if self.events else {}

    def _count(self, *happened: bool) -> None:
        self.counts = {name: self.counts[name] + did for name, did in zip(COUNTED, happened, strict=True)}

    def state(self) -> Tree:
        parts = {"proxy": self.proxy, "resets": self.resets, "bounds": self.bounds, "micro": self._micro}
        kept = {name: part.state() for name, part in parts.items() if part is not None}
        return kept | {"events": self.events, "counts": self.counts}

    def load_state(self, tree: Tree) -> None:
        parts = {"proxy": self.proxy, "resets": self.resets, "bounds": self.bounds, "micro": self._micro}
        for name, part in parts.items():
            if part is not None:
                part.load_state(tree[name])
        self.events, self.counts = tree["events"], dict(tree["counts"])
