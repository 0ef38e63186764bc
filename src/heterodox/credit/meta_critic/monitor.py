"""What the rule tells of its meta-steps, in the steps between them too.

Critics learn every `meta_every` steps, for sampled stages, and joint changes come every `joint_every` steps; the log
has a rhythm of its own. What one step has measured stands in the log until it is measured again.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.comm import Comm
from heterodox.core.state import Tree, restore
from heterodox.credit.meta_critic.forward import Forward
from heterodox.credit.meta_critic.layout import Stage
from heterodox.credit.meta_critic.meta import MetaObjective, Summaries
from heterodox.credit.meta_critic.schedule import Schedule

OF_META_STEPS = ("meta_loss", "meta_variance", "meta_gain", "meta_penalty")


class Monitor:
    """The last value of each of `names`, a mean over the ranks; before there is one inf, which the log calls null."""

    def __init__(self, names: Iterable[str], like: Tensor) -> None:
        self.values = {name: torch.full((), math.inf, dtype=like.dtype, device=like.device) for name in names}

    @torch.no_grad()
    def note(self, found: Mapping[str, Tensor], comm: Comm) -> None:
        """New values of some, as this rank has them."""
        for name, value in found.items():
            self.values[name].copy_(value)
        comm.mean_([self.values[name] for name in found])

    def told(self) -> dict[str, Tensor]:
        """What there is to log, as copies: a row may be written after a later step."""
        return {name: value.clone() for name, value in self.values.items()}

    def forget(self, quantity: str) -> None:
        """Tell no more of a quantity that is not measured any longer."""
        for name, value in self.values.items():
            if name.startswith(f"{quantity}/"):
                value.fill_(math.inf)

    def state(self) -> Tree:
        return {name.replace("/", "."): value for name, value in self.values.items()}

    def load_state(self, tree: Tree) -> None:
        restore(self.state(), tree, "monitored value")


def monitored(schedule: Schedule, stages: Iterable[Stage]) -> list[str]:
    """The names of all that is not measured in every step."""
    quantities: list[str] = []
    if schedule.training == "regression" or schedule.regression_steps:
        quantities.append("regression_loss")
    if schedule.training == "meta":
        quantities += OF_META_STEPS
    if schedule.joint_every is not None:
        quantities.append("proposal_gain")
    names = [f"{quantity}/{stage.key}" for quantity in quantities for stage in stages]
    names += [] if schedule.training == "frozen" else ["meta_grad_norm/critics", "meta_grad_norm/target"]
    return names + ([] if schedule.joint_every is None else ["proposal_gain/joint"])


def of_partial_forwards(
    seen: Forward,
    stages: Sequence[Stage],
    losses: Mapping[int, Float[Tensor, " batch"]],
    tried: Summaries,
    meta: MetaObjective,
    comm: Comm,
) -> dict[str, Tensor]:
    """By stage the loss that its proposal would have made, its variance over examples, the gain, and the penalty.

    Losses are weighted as in training, the variance alike and about the mean of all ranks.
    """
    means = {stage.index: (losses[stage.index] * seen.weights).mean() for stage in stages}
    centres = {index: mean.clone() for index, mean in means.items()}
    comm.mean_(list(centres.values()))
    found: dict[str, Tensor] = {}
    for stage in stages:
        spread = (losses[stage.index] - centres[stage.index]).square()
        found[f"meta_loss/{stage.key}"] = means[stage.index]
        found[f"meta_variance/{stage.key}"] = (spread * seen.weights).mean()
        found[f"meta_gain/{stage.key}"] = seen.loss - means[stage.index]
        found[f"meta_penalty/{stage.key}"] = meta.regulariser(tried[stage.index], comm)
    return found


def of_gradients(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Norms of the gradients of MLP_G and of all critics."""
    of_target = [g.square().sum() for name, g in grads.items() if name.startswith("target.")]
    of_critics = [g.square().sum() for name, g in grads.items() if not name.startswith("target.")]
    return {
        "meta_grad_norm/target": torch.stack(of_target).sum().sqrt(),
        "meta_grad_norm/critics": torch.stack(of_critics).sum().sqrt(),
    }
