"""A rater trained from beginning to end within another run."""

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from heterodox.core.errors import RecipeError
from heterodox.core.protocols import Stateless
from heterodox.core.services import Services
from heterodox.core.types import Batch, Cost
from heterodox.meta.options import MetaOptions
from heterodox.meta.steps import InnerAdamW
from heterodox.meta.trainer import MetaTrainer


class TrainOptions(MetaOptions):
    """Meta-training before the run's first step, with inner models of the run's own kind, by AdamW."""

    rounds: int = Field(100, ge=1, description="meta-gradients of each inner model")
    inner_lr: float = Field(1e-3, gt=0, description="learning rate of the inner models")


class TokenLoss(Stateless):
    """Mean cross-entropy of each example, in nats per token."""

    def losses(self, logits: Float[Tensor, "batch time vocab"], batch: Batch) -> Float[Tensor, " batch"]:
        wide = logits if logits.dtype.itemsize >= 4 else logits.float()
        return F.cross_entropy(wide.transpose(1, 2), batch.targets, reduction="none").mean(dim=1)


def train_rater(options: TrainOptions, services: Services) -> tuple[dict[str, Tensor], Cost]:
    """The averaged rater's weights by name, and what this rank has spent on them.

    Raises `RecipeError` where a gradient is not finite: it would leave a rater that scores nothing.
    """
    trainer = MetaTrainer(options, services, TokenLoss(), InnerAdamW(lr=options.inner_lr, eps_root=options.eps_root))
    total = Cost()
    while trainer.rounds < options.rounds:
        found = trainer.step()
        if not found.grad_norm.isfinite():
            raise RecipeError(
                f"the meta-gradient of round {trainer.rounds} of rating.train is not finite: the inner models have "
                f"diverged or are chaotic; lower rating.train.inner_lr {options.inner_lr:g}, shorten "
                f"rating.train.backprop_steps {options.backprop_steps}, or raise batch_size {options.batch_size}"
            )
        total += found.cost
    return trainer.average_by_name(), total
