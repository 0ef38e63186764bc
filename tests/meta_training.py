"""A rater in meta-training on random batches, in float64, small enough to follow by hand."""

from typing import Any

import torch

from heterodox.core.comm import Solo
from heterodox.core.protocols import Stateless
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.core.types import Batch
from heterodox.meta.options import MetaOptions
from heterodox.meta.steps import InnerSGD
from heterodox.meta.training import MetaTrainer, TokenLoss
from tests.tiny import tiny_batch, tiny_gpt

SMALL: dict[str, Any] = {
    "rater": {"layers": 0, "conv": 3, "width": 8}, "inner_steps": 2, "backprop_steps": 2,
    "batch_size": 4, "val_batches": 1, "val_batch_size": 4, "lr": 0.01, "clip": None,
}  # fmt: skip


class Endless(Stateless):
    """Batches of random tokens, other ones each time and in each order; their ids are the examples' own."""

    examples_per_epoch = 1000

    def __init__(self, split: str, batch_size: int, order: str | int) -> None:
        self.size, self.number = batch_size, Streams(7).derive("data", split, order) % 10_000

    def next_batch(self) -> Batch:
        self.number += 1
        batch = tiny_batch(batch=self.size, seed=self.number)
        return Batch(batch.inputs, batch.targets, batch.ids + self.size * self.number)


def supply(
    split: str, batch_size: int, order: str | int = 0, *, whole: bool = False, without: torch.Tensor | None = None
) -> Endless:
    return Endless(split, batch_size, order)


def meta_trainer(inner_lr: float = 0.1, *, model: dict[str, Any] | None = None, **options: Any) -> MetaTrainer:
    """A rater that already prefers some examples, and what trains it."""
    services = Services(tiny_gpt(layers=1, **(model or {})), Streams(0), Solo(), supply)
    found = MetaTrainer(MetaOptions(**(SMALL | options)), services, TokenLoss(), InnerSGD(lr=inner_lr))
    with torch.no_grad():
        found.rater.head.weight.copy_(torch.linspace(-1, 1, 8)[None])
    found.average = weights_of(found)
    return found


def weights_of(trainer: MetaTrainer) -> torch.Tensor:
    """The rater's, as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in trainer.parameters])
