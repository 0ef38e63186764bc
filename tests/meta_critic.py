"""A critic rule on the tiny GPT in float64, and its meta-objective taken apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

from heterodox.core.comm import Solo
from heterodox.core.rng import Streams
from heterodox.credit import MetaCritic
from heterodox.credit.meta_critic.forward import look, main_forward
from heterodox.credit.meta_critic.meta_step import (
    critic_gradients,
    leaves_of,
    meta_loss_gradients,
    propose,
    regression_gradients,
)
from heterodox.credit.meta_critic.networks import Stage
from heterodox.model import GPT
from heterodox.objective import CrossEntropy
from tests.signals import WEIGHTS
from tests.tiny import tiny_batch


def rule_of(model: GPT, seed: int = 0, **options) -> MetaCritic:
    options = {"critic_hidden": 5, "target_hidden": 5} | options
    return MetaCritic.Config(**options).build(model, Streams(seed))


@dataclass
class Meta:
    """The meta-loss at the rule's θ, its gradient by θ, and by stage the losses and the proposals behind it.

    With `hypothesis: activations` the proposals are errors by slot.
    """

    value: Tensor
    gradient: dict[str, Tensor]
    losses: dict[int, Tensor]
    proposals: dict[int, dict[str, Tensor]]


def _phase_a(rule: MetaCritic, model: GPT, stages: list[Stage]):
    """The proposals' summaries, and what `meta_loss_gradients` says of them."""
    proposals, objective = rule.proposals, CrossEntropy()
    seen = main_forward(model, tiny_batch(), WEIGHTS, objective, rule.operations)
    sight = look(proposals.target_kind, seen, objective, Solo(), torch.float64)
    activations = rule.meta.activations
    summaries = propose(proposals, seen, stages, sight, proposals.target(sight), Solo(), activations=activations)
    leaves = leaves_of(summaries)
    for leaf in (leaf for found in leaves.values() for leaf in found.values()):
        leaf.requires_grad_()
    return summaries, meta_loss_gradients(model, seen, objective, proposals, stages, leaves, rule.meta, Solo())


def summary_gradients(rule: MetaCritic, model: GPT) -> list[Tensor]:
    """The meta-loss's gradient by what the critics of all stages propose."""
    _, (grads, _, _) = _phase_a(rule, model, rule.proposals.stages)
    return [g for found in grads.values() for g in found.values()]


def meta_of(rule: MetaCritic, model: GPT, stages: list[Stage] | None = None) -> Meta:
    stages = stages or rule.proposals.stages
    summaries, (grads, losses, matrices) = _phase_a(rule, model, stages)
    learning, activations = rule.proposals.critics.learning_for(stages), rule.meta.activations
    gradient = critic_gradients(summaries, grads, learning, Solo(), activations=activations)
    each = [(losses[s.index] * WEIGHTS).mean() + rule.meta.regulariser(matrices[s.index], Solo()) for s in stages]
    return Meta(torch.stack(each).mean(), gradient, losses, matrices)


def regression_of(rule: MetaCritic, model: GPT) -> tuple[Tensor, dict[str, Tensor]]:
    """The terms of gradient regression by stage, and the gradient of their mean by θ."""
    proposals, objective, stages = rule.proposals, CrossEntropy(), rule.proposals.stages
    seen = main_forward(model, tiny_batch(), WEIGHTS, objective, rule.operations)
    sight = look(proposals.target_kind, seen, objective, Solo(), torch.float64)
    summaries = propose(proposals, seen, stages, sight, proposals.target(sight), Solo())
    leaves = leaves_of(summaries)
    for leaf in (leaf for found in leaves.values() for leaf in found.values()):
        leaf.requires_grad_()
    with torch.enable_grad():
        grads, terms = regression_gradients(model, seen, objective, proposals, stages, leaves, rule.meta, Solo())
    gradient = critic_gradients(summaries, grads, proposals.critics.learning_for(stages), Solo())
    return torch.stack(list(terms.values())), gradient


def slope(rule: MetaCritic, model: GPT, value, seed: int = 0, eps: float = 1e-5) -> tuple[float, dict[str, Tensor]]:
    """Along a random direction of θ: the centred difference of `value()`, and the direction."""
    parameters = dict(rule.proposals.critics.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters.items()}
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(direction[name], alpha=sign * eps)
            ends.append(float(value()))
            for name, parameter in parameters.items():
                parameter.sub_(direction[name], alpha=sign * eps)
    return (ends[0] - ends[1]) / (2 * eps), direction


def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The scalar product over the names of `a`."""
    return float(sum((a[name] * b[name]).sum() for name in a))
