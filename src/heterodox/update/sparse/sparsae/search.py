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

from heterodox.core.errors import RecipeError
from heterodox.core.services import LearnableSplit, Services, no_supply
from heterodox.core.state import Tree
from heterodox.core.types import Batch
from heterodox.update.sparse.distribution import Distribution, distribute
from heterodox.update.sparse.masks import Masks
from heterodox.update.sparse.sparsae.bounds import Bounds
from heterodox.update.sparse.sparsae.config import SparsaeOptions
from heterodox.update.sparse.sparsae.generation import Generation, loggable
from heterodox.update.sparse.sparsae.prefetch import Prefetch
from heterodox.update.sparse.sparsae.proxy import Proxy
from heterodox.update.sparse.sparsae.reset import Resets
from heterodox.update.sparse.topology import Change, Sight, Topology, require_one

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
