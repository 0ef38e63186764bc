"""When critics learn, by what and for which stages; when proposals are handed over, and how large."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from heterodox.core.rng import Streams
from heterodox.credit.meta_critic.layout import Stage

Training = Literal["meta", "regression", "frozen"]


@dataclass(frozen=True)
class Schedule:
    """The options of a recipe that depend on the step, counted from 0."""

    training: Training = "meta"
    regression_steps: int = 0
    layers_per_step: int | None = None
    meta_every: int = 1
    meta_only_steps: int = 0
    proposal_warmup: int = 0
    joint_every: int | None = None

    def learns(self, step: int) -> bool:
        """Whether there is a meta-step."""
        return self.training != "frozen" and step % self.meta_every == 0

    def regresses(self, step: int) -> bool:
        """Whether the meta-step is one of gradient regression."""
        return self.training == "regression" or step < self.regression_steps

    def joins(self, step: int) -> bool:
        """Whether the joint change of the loss is measured: at steps that are logged, which are counted from 1."""
        return self.joint_every is not None and (step + 1) % self.joint_every == 0

    def sampled(self, stages: Sequence[Stage], streams: Streams, step: int) -> list[Stage]:
        """The stages of a meta-step: the same on every rank, and again after a resume."""
        if self.layers_per_step is None or self.layers_per_step >= len(stages):
            return list(stages)
        chosen = random.Random(streams.derive("rule", "layers", step))
        return [stages[index] for index in sorted(chosen.sample(range(len(stages)), self.layers_per_step))]

    def scale(self, step: int) -> float:
        """What proposals are multiplied by; 0 while critics only learn."""
        if step < self.meta_only_steps:
            return 0.0
        return min(1.0, (step - self.meta_only_steps + 1) / self.proposal_warmup) if self.proposal_warmup else 1.0
