"""When masks change, and by how much: schedules as data."""

import math
from typing import Literal

from pydantic import Field

from heterodox.core import config

Decay = Literal["cosine", "constant"]


class Schedule(config.Config):
    """An event every so many steps, from one step of the run to a share of it."""

    every: int = Field(100, ge=1, description="steps between two changes of the mask")
    start: int = Field(0, ge=0, description="no change before this step")
    until: float = Field(0.75, gt=0, le=1, description="no change after this share of the run's steps")

    def last(self, steps: int) -> int:
        """The last step that may change the mask in a run of so many."""
        return math.floor(self.until * steps)

    def num_events(self, steps: int) -> int:
        """How many events a run of so many steps has."""
        return self.last(steps) // self.every - max(self.start - 1, 0) // self.every

    def due(self, step: int, steps: int) -> bool:
        """Whether the mask changes after this step."""
        return step % self.every == 0 and self.start <= step <= self.last(steps)

    def progress(self, step: int, steps: int) -> float:
        """The share of the time for changes that has passed, from 0 at `start` to 1 at the last step."""
        span = self.last(steps) - self.start
        return min(max((step - self.start) / span, 0.0), 1.0) if span > 0 else 1.0

    def refusals(self, recipe: config.Config) -> list[str]:
        budget = recipe.run.budget  # pyrefly: ignore[missing-attribute]
        if budget.steps is None:
            return [f"update.topology needs a run.budget in steps, to know when to stop; found one in {budget.unit}"]
        if self.num_events(budget.steps) < 1:
            return [
                f"update.topology.every is {self.every}, but the mask may change only from step {self.start} to "
                f"{self.last(budget.steps)} of {budget.steps}: it never would; lower it"
            ]
        return []


class DecayingSchedule(Schedule):
    """Events that change less and less; one in which nothing is left to change is none."""

    decay: Decay = Field("cosine", description="of the share that an event changes, over the time for changes")

    def num_events(self, steps: int) -> int:
        return super().num_events(steps) - self._idle(self.last(steps), steps)

    def due(self, step: int, steps: int) -> bool:
        return super().due(step, steps) and not self._idle(step, steps)

    def _idle(self, step: int, steps: int) -> bool:
        return self.decay == "cosine" and super().due(step, steps) and self.progress(step, steps) == 1.0

    def decayed(self, share: float, step: int, steps: int) -> float:
        """What is left of a `share` at this step."""
        return share * (cosine(self.progress(step, steps)) if self.decay == "cosine" else 1.0)


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def cubic(progress: float) -> float:
    """From 0 to 1, fast at first: 1 − (1 − progress)³."""
    return 1 - (1 - progress) ** 3
