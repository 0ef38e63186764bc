"""Global resets: now and then a child that is changed on a large scale, more often when nothing gets better.

Stagnation is measured on a batch of its own, the same one in every event: no new lowest loss for `patience` events
boosts the probability for the next `boosts` events.
"""

import math

from pydantic import Field

from heterodox.core import config
from heterodox.core.state import Tree


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
