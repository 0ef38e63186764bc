"""A rater trained from beginning to end within another run."""

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from heterodox.core.errors import RecipeError
from heterodox.core.protocols import Stateless
from heterodox.core.services import Services
from heterodox.core.state import Tree
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
    """The most bytes that `RaterTraining` will hold for a way back, with windows as wide as `like`; changes nothing."""
    model = duplicate(services.model)
    update = inner_adamw(options, model)

    def losses(model: Any, batch: Batch) -> Float[Tensor, " batch"]:
        return TokenLoss().losses(model(batch.inputs), batch)

    def weigh(batch: Batch) -> Float[Tensor, " batch"]:
        return weighting(rater(batch.inputs))

    start = update.begin(WeightedLoss(model, losses).weights())
    return window_bytes(options, model, losses, rater, weigh, update, start, like)


class RaterTraining:
    """A rater's training from beginning to end, a step of the inner models (or the end of a round) at a time."""

    def __init__(self, options: TrainOptions, services: Services) -> None:
        self.options = options
        self.trainer = MetaTrainer(options, services, TokenLoss(), inner_adamw(options, services.model))
        self.spent = Cost()
        """What this rank has spent so far."""

    @property
    def done(self) -> bool:
        return self.trainer.rounds >= self.options.rounds

    @property
    def between_rounds(self) -> bool:
        return self.trainer.ticks == 0

    @property
    def growth(self) -> float:
        """How far an adjoint grew at most."""
        return self.trainer.growth

    def step(self) -> None:
        """Take a step. Raises `RecipeError` where a gradient or the rater is not finite: it would score nothing."""
        trainer, options = self.trainer, self.options
        found = trainer.step()
        self.spent += found.cost
        where = f"round {trainer.rounds} of rating.train"
        if not found.grad_norm.isfinite():
            raise RecipeError(
                f"the meta-gradient of {where} is not finite: the inner models have diverged or are chaotic; lower "
                f"rating.train.inner_lr {options.inner_lr:g}, shorten rating.train.backprop_steps "
                f"{options.backprop_steps}, or raise batch_size {options.batch_size}"
            )
        if not trainer.average.isfinite().all():
            raise RecipeError(f"the rater is not finite behind {where}; lower rating.train.lr {options.lr:g}")

    def weights(self) -> dict[str, Tensor]:
        """Return the averaged rater's weights by name."""
        return self.trainer.average_by_name()

    def state(self) -> Tree:
        return {"trainer": self.trainer.state(), "spent": asdict(self.spent)}

    def load_state(self, tree: Tree) -> None:
        self.trainer.load_state(tree["trainer"])
        self.spent = Cost(**tree["spent"])
