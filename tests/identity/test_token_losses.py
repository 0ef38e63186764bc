"""What an objective says of each token, and what a critic rule is told of it, in float64."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.core.protocols import Stateless
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.credit.meta_critic.forward import look, main_forward, token_losses
from heterodox.learner.step import Gradient
from heterodox.objective import CrossEntropy, SelfDistillation
from heterodox.rating import Uniform
from heterodox.update import SGD
from tests.meta_critic import rule_of
from tests.signals import WEIGHTS, same
from tests.tiny import tiny_batch, tiny_gpt
from tests.tiny_sparse import supply


def critic_learner(objective: CrossEntropy | SelfDistillation) -> Gradient:
    """A critic rule that sees each token's loss; the teacher, if there is one, is asked from the first step on."""
    model = tiny_gpt()
    if isinstance(objective, SelfDistillation):
        objective.connect(Services(model, Streams(0), Solo(), supply, 10))
    learner = Gradient(model, objective, Uniform(), rule_of(model, target="token"), SGD(lr=0.1), Solo())
    learner.begin()
    return learner


@pytest.mark.parametrize("objective", [CrossEntropy, lambda: SelfDistillation(warmup_steps=0, decay=0.9)])
def test_losses_of_tokens_average_to_those_of_examples(objective):
    """Also with a teacher who has fallen behind; and what the critics see is these losses."""
    learner = critic_learner(objective())
    for step in range(1, 4):
        learner.step(tiny_batch(seed=step))
    batch, asked = tiny_batch(), learner.objective
    seen = main_forward(learner.model, batch, WEIGHTS, asked, learner.credit.operations)
    told = token_losses(seen, asked)
    assert same(told.mean(dim=1), asked.losses(seen.logits, batch))
    assert told.std() > 0.1
    sight = look("token", seen, asked, Solo(), torch.float64)
    assert torch.equal(sight.context[..., -1], told)
    plain = CrossEntropy().losses(seen.logits, batch)
    assert torch.allclose(told.mean(dim=1), plain, rtol=1e-6) == isinstance(asked, CrossEntropy)


def test_a_step_with_a_teacher_costs_what_is_counted():
    learner = critic_learner(SelfDistillation(warmup_steps=0))
    learner.step(tiny_batch(seed=1))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        told = learner.step(tiny_batch(seed=2)).cost.flops
    assert told == counter.get_total_flops()


class Opaque(Stateless):
    """Cross-entropy that says nothing of tokens."""

    def losses(self, logits, batch):
        return CrossEntropy().losses(logits, batch)


def test_an_objective_that_cannot_tell_tokens_apart_is_refused():
    model = tiny_gpt()
    with pytest.raises(RecipeError, match="needs the loss of every token, and objective Opaque has no token_losses"):
        rule_of(model, target="token").signal(model, tiny_batch(), WEIGHTS, Opaque())
    assert rule_of(model).signal(model, tiny_batch(), WEIGHTS, Opaque()).grads
