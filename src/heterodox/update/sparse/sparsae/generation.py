"""One event of the search: a parent, its children, and what each of them scores."""

import math
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heterodox.core.extensions import Window
from heterodox.core.services import Batches
from heterodox.update.sparse.sparsae.bounds import Bounds
from heterodox.update.sparse.sparsae.config import Selection, SparsaeOptions
from heterodox.update.sparse.sparsae.proxy import layer_activities, unevenness
from heterodox.update.sparse.sparsae.swaps import Pools, Swap, apply_swap, most, pools, relative_size, swap
from heterodox.update.sparse.topology import Sight


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
        batch = micro.next_batch()
        loss, grads = window.signal(batch, {})
        self.signal = sight.masks.join(grads)
        self.batch = batch
        if options.judge == "look_ahead":  # not the batch that the step is taken on, which would flatter it
            self.batch = micro.next_batch()
            loss = window.loss(self.batch, {})
        self.rows: list[dict[str, Any]] = []
        self.masks: list[Bool[Tensor, " entries"]] = []
        self.values: list[Float[Tensor, " grown"] | None] = []
        self.activities: list[list[float]] = []
        self._add(loss, self.signal, sight.masks.flat.clone(), None, {"swaps": 0, "reset": False})
        scratch = sight.weights.clone()
        for number in range(1, options.children + 1):
            self._add_child(number, scratch)

    def _add_child(self, number: int, scratch: Float[Tensor, " entries"]) -> None:
        """Draw a child, write its weights into the parent's, score them, and put the parent's back."""
        sight, options = self.sight, self.options
        generator = sight.generator("child", number)
        reset = bool(torch.rand((), generator=generator) < self.reset_probability)
        change = self._swap(reset, generator)
        born = sight.draw(change.grown, f"child {number}")
        views = sight.masks.split(scratch)
        scratch[change.dropped] = 0
        if options.judge == "at_once":
            scratch[change.grown] = born
            loss, grads = self.window.signal(self.batch, views)
            signal = sight.masks.join(grads)
        else:
            signal = self.signal
            step = sight.first_step(born, signal[change.grown]) - born
            scratch[change.grown] = born + options.reach * step
            loss = self.window.loss(self.batch, views)
        scratch[change.dropped] = sight.weights[change.dropped]
        scratch[change.grown] = 0
        about = {"swaps": len(change.grown), "reset": reset}
        self._add(loss, signal, apply_swap(sight.masks.flat, change), born, about)

    def _swap(self, reset: bool, generator: torch.Generator) -> Swap:
        options, masks = self.options, self.sight.masks
        share = options.reset.fraction if reset else options.mutation
        count = min(max(round(share * int(masks.flat.sum())), 1), most(masks, self.bounds))
        return swap(masks, self.bounds, self._anything if reset else self._aimed, count, generator)

    @cached_property
    def _anything(self) -> Pools:
        return pools(self.sight.masks, None, None, 0)

    @cached_property
    def _aimed(self) -> Pools:
        options, masks = self.options, self.sight.masks
        size = relative_size(self.sight.weights, masks) if options.drop == "magnitude" else None
        activity = self.signal.abs() if options.grow == "activity" else None
        count = math.ceil(options.pool * options.mutation * int(masks.flat.sum()))
        return pools(masks, size, activity, count)

    def _add(self, loss: Tensor, signal: Tensor, flat: Tensor, values: Tensor | None, about: dict[str, Any]) -> None:
        masks = self.sight.masks
        layers = layer_activities(signal, flat, masks.sizes).tolist()
        row = {
            "candidate": len(self.rows),
            **about,
            "ce": float(loss),
            "diversity": unevenness(masks.counts(flat), masks.sizes, self.options.proxy.form),
            "activity": sum(layers) / len(layers),
        }
        row["finite"] = all(math.isfinite(row[part]) for part in ("ce", "diversity", "activity"))
        self.rows.append(row)
        self.masks.append(flat)
        self.values.append(values)
        self.activities.append(layers)

    def choose(self, selection: Selection) -> int:
        """The number of the winner; the parent where no candidate is finite."""
        finite = [row for row in self.rows if row["finite"]] or self.rows[:1]
        if selection == "random":
            winner = finite[int(torch.randint(len(finite), (), generator=self.sight.generator("winner")))]
        else:
            key = "score" if selection == "proxy" else "ce"
            winner = min(finite, key=lambda row: row[key])
        for row in self.rows:
            row["won"] = row is winner
        return winner["candidate"]


def loggable(value: Any) -> Any:
    """`value` with null for every number that is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: loggable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [loggable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
