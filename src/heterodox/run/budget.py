"""What a run has consumed, and how much of its budget is left."""

import math
from dataclasses import asdict, dataclass

from heterodox.core.types import Cost
from heterodox.run.config import Budget, RunConfig


@dataclass
class Progress:
    """Totals over all ranks; `seconds` are spent in training steps alone.

    `sparse_flops` are what `flops` would be if masked weights cost nothing.
    """

    step: int = 0
    tokens: int = 0
    meta_tokens: int = 0
    flops: int = 0
    sparse_flops: int = 0
    seconds: float = 0.0

    def advance(self, cost: Cost, ranks: int) -> None:
        self.step += 1
        self.tokens += cost.tokens * ranks
        self.meta_tokens += cost.meta_tokens * ranks
        self.flops += cost.flops * ranks
        self.sparse_flops += (cost.flops - cost.masked_flops) * ranks

    def spent(self, budget: Budget) -> float:
        """The share of the budget that is gone; 1 or more: stop."""
        amount = {
            "steps": self.step,
            "tokens": self.tokens + self.meta_tokens,
            "flops": self.flops,
            "seconds": self.seconds,
        }[budget.unit]
        return amount / budget.limit

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


def lr_scale(config: RunConfig, progress: Progress) -> float:
    """The factor on the learning rate for the coming step: linear warm-up, then the schedule over the budget."""
    warmup = min(1.0, (progress.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return warmup
    done = progress.spent(config.budget)
    if config.budget.steps is not None:  # the cosine begins where the warm-up ends
        done = max(0.0, progress.step - config.warmup_steps) / (config.budget.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return warmup * (config.final_lr + (1 - config.final_lr) * cosine)
