"""One event of the search: a parent, its children, and what each of them scores."""

import math
from collections.abc import Sequence
from dataclasses import replace
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
from heterodox.update.sparse.sparsae.swaps import (
    Pools,
    Swap,
    apply_swap,
    favoured,
    most,
    pools,
    relative_signal,
    relative_size,
    swap,
    swap_in_layers,
)
from heterodox.update.sparse.topology import Sight

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
