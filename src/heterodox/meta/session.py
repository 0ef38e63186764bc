"""A rater trained from beginning to end within another run."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from heterodox.core.errors import RecipeError
from heterodox.core.protocols import Stateless
from heterodox.core.services import Services
from heterodox.core.types import Batch, Cost
from heterodox.meta.memory import window_bytes
from heterodox.meta.options import MetaOptions
from heterodox.meta.population import duplicate
from heterodox.meta.problem import WeightedLoss, flat
from heterodox.meta.rater import Rater
from heterodox.meta.steps import InnerAdamW
from heterodox.meta.trainer import MetaTrainer
from heterodox.meta.weighting import ScoreWeighting

BETAS, WEIGHT_DECAY = (0.9, 0.99), 0.1
"""The defaults of `update: adamw`, which decays matrices only."""


class TrainOptions(MetaOptions):
    """Meta-training before the run's first step, with inner models of the run's own kind, by AdamW."""

    rounds: int = Field(100, ge=1, description="meta-gradients of each inner model")
    inner_lr: float = Field(1e-3, gt=0, description="learning rate of the inner models; the rest as adamw by default")


class TokenLoss(Stateless):
    """Mean cross-entropy of each example, in nats per token."""

    def losses(self, logits: Float[Tensor, "batch time vocab"], batch: Batch) -> Float[Tensor, " batch"]:
        wide = logits if logits.dtype.itemsize >= 4 else logits.float()
        return F.cross_entropy(wide.transpose(1, 2), batch.targets, reduction="none").mean(dim=1)


def inner_adamw(options: TrainOptions, model: nn.Module) -> InnerAdamW:
    """As `update: adamw` is by default, at another learning rate."""
    learning = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    decay = flat(torch.full_like(parameter, WEIGHT_DECAY * (parameter.ndim >= 2)) for parameter in learning)
    return InnerAdamW(
        options.inner_lr, BETAS, eps_root=options.eps_root, weight_decay=decay, warmup=options.inner_warmup
    )


def rater_bytes(options: TrainOptions, services: Services, rater: Rater, weighting: ScoreWeighting, like: Batch) -> int:
    """The most bytes that `train_rater` will hold for a way back, with windows as wide as `like`; changes nothing."""
    model = duplicate(services.model)
    update = inner_adamw(options, model)

    def losses(model: Any, batch: Batch) -> Float[Tensor, " batch"]:
        return TokenLoss().losses(model(batch.inputs), batch)

    def weigh(batch: Batch) -> Float[Tensor, " batch"]:
        return weighting(rater(batch.inputs))

    start = update.begin(WeightedLoss(model, losses).weights())
    return window_bytes(options, model, losses, rater, weigh, update, start, like)


def train_rater(options: TrainOptions, services: Services) -> tuple[dict[str, Tensor], Cost, float]:
    """The averaged rater's weights by name, what this rank has spent on them, and how far an adjoint grew at most.

    Raises `RecipeError` where a gradient or the rater is not finite: it would score nothing.
    """
    trainer = MetaTrainer(options, services, TokenLoss(), inner_adamw(options, services.model))
    total = Cost()
    while trainer.rounds < options.rounds:
        found = trainer.step()
        where = f"round {trainer.rounds} of rating.train"
        if not found.grad_norm.isfinite():
            raise RecipeError(
                f"the meta-gradient of {where} is not finite: the inner models have diverged or are chaotic; lower "
                f"rating.train.inner_lr {options.inner_lr:g}, shorten rating.train.backprop_steps "
                f"{options.backprop_steps}, or raise batch_size {options.batch_size}"
            )
        if not trainer.average.isfinite().all():
            raise RecipeError(f"the rater is not finite behind {where}; lower rating.train.lr {options.lr:g}")
        total += found.cost
    return trainer.average_by_name(), total, trainer.growth
