"""W − B under Kolen–Pollack: what set the two apart at the start is forgotten at the rate of the weight decay."""

import pytest
import torch

from heterodox.core.comm import Solo
from heterodox.core.rng import Streams
from heterodox.credit import Backprop, KolenPollack
from heterodox.credit.feedback import linear_layers
from heterodox.learner import Gradient
from heterodox.objective import CrossEntropy
from heterodox.rating import Uniform
from heterodox.update import SGD, AdamW
from tests.signals import grads_of
from tests.tiny import tiny_batch, tiny_gpt

STEPS = 60


def scale(step: int) -> float:
    """Of the learning rate: warm-up, then a line down."""
    return min(1.0, (step + 1) / 10) * (1 - step / (2 * STEPS))


def differences(update, clip=None, steps=STEPS):
    """W − B of each layer before the first step and after each, and how far W and B have moved."""
    model = tiny_gpt()
    rule = KolenPollack.Config(feedback_std=0.2).build(model, Streams(0))
    learner = Gradient(model, CrossEntropy(), Uniform(), rule, update, Solo(), clip=clip)
    layers = linear_layers(model)
    first = {name: (layer.weight.detach().clone(), rule.feedback[name].clone()) for name, layer in layers.items()}
    walk = [{name: w - b for name, (w, b) in first.items()}]
    for step in range(steps):
        learner.step(tiny_batch(seed=step), lr_scale=scale(step))
        walk.append({name: layers[name].weight.detach() - rule.feedback[name] for name in layers})
    moved = {n: min((layers[n].weight - w).norm(), (rule.feedback[n] - b).norm()) for n, (w, b) in first.items()}
    return walk, moved


def factors(update) -> list[float]:
    """W − B over what it was, after each step: its decay by hand. Gradients cancel, so that only λ is left."""
    found, gap, velocity = [1.0], 1.0, 0.0
    for step in range(STEPS):
        rate = update.lr * scale(step)
        if isinstance(update, SGD):
            velocity = update.momentum * velocity + update.weight_decay * gap
            ahead = update.weight_decay * gap + update.momentum * velocity
            gap -= rate * (ahead if update.nesterov else velocity)
        else:
            gap *= 1 - rate * update.weight_decay
        found.append(gap)
    return found


UPDATES = {
    "sgd": lambda decay: SGD(lr=0.05, weight_decay=decay),
    "sgd with momentum": lambda decay: SGD(lr=0.02, momentum=0.9, weight_decay=decay),
    "sgd with nesterov": lambda decay: SGD(lr=0.02, momentum=0.9, nesterov=True, weight_decay=decay),
    "adamw": lambda decay: AdamW(lr=0.02, weight_decay=decay),
}


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("name", UPDATES)
def test_the_difference_decays_at_the_rate_of_the_weight_decay(name, clip):
    update = UPDATES[name](0.5)
    walk, moved = differences(update, clip)
    wanted = factors(update)
    assert wanted[-1] < 0.8
    assert min(moved.values()) > 1e-2, "degenerate: nothing was learnt"
    for after, factor in zip(walk, wanted, strict=True):
        for layer, gap in after.items():
            assert torch.allclose(gap, factor * walk[0][layer], rtol=1e-9, atol=1e-12), layer
    assert all(gap.norm() > 0.1 for gap in walk[0].values()), "degenerate: B began as W"


@pytest.mark.parametrize("name", UPDATES)
def test_without_decay_it_stays(name):
    walk, moved = differences(UPDATES[name](0.0))
    assert min(moved.values()) > 1e-3
    assert all(torch.allclose(gap, walk[0][layer], rtol=1e-9, atol=1e-12) for layer, gap in walk[-1].items())


def test_an_update_that_treats_the_two_apart_is_noticed():
    class Late(AdamW):
        """Skips the feedback in the first step."""

        def apply(self, parameters, grads, scale=1.0):
            own = {name for name in grads if name.startswith("feedback:")}
            skipped = {name: g for name, g in grads.items() if name not in own or self.moments}
            super().apply(parameters, skipped, scale)

    update = Late(lr=0.02, weight_decay=0.5)
    walk, _ = differences(update, steps=3)
    ratio = factors(update)[3]
    assert not any(torch.allclose(gap, ratio * walk[0][layer], rtol=1e-3) for layer, gap in walk[-1].items())


def test_feedback_that_began_as_the_weights_stays_backprop():
    model, twin = tiny_gpt(), tiny_gpt()
    rule = KolenPollack({name: layer.weight.detach().clone() for name, layer in linear_layers(model).items()})
    mine = Gradient(model, CrossEntropy(), Uniform(), rule, AdamW(), Solo())
    theirs = Gradient(twin, CrossEntropy(), Uniform(), Backprop(), AdamW(), Solo())
    for step in range(5):
        assert torch.allclose(mine.step(tiny_batch(seed=step)).loss, theirs.step(tiny_batch(seed=step)).loss)
    for name, weight in model.named_parameters():
        if not name.endswith("attn.k.bias"):  # whose gradient is zero but for rounding, which Adam blows up
            assert torch.allclose(weight, twin.get_parameter(name), rtol=1e-9, atol=1e-10), name


def test_the_feedback_learns_from_the_clipped_signal_and_does_not_count_in_its_norm():
    model = tiny_gpt()
    rule = KolenPollack.Config().build(model, Streams(0))
    norm = torch.stack([g.norm() for g in grads_of(rule, model, torch.ones(4, dtype=torch.float64)).values()])
    before = {name: matrix.clone() for name, matrix in rule.feedback.items()}
    learner = Gradient(model, CrossEntropy(), Uniform(), rule, SGD(lr=1.0), Solo(), clip=0.01)
    report = learner.step(tiny_batch())
    assert torch.allclose(report.grad_norm, norm.norm())
    assert report.grad_norm > 0.1
    moved = torch.stack([(rule.feedback[name] - matrix).norm() for name, matrix in before.items()]).norm()
    assert 0.001 < moved <= 0.01


def test_the_feedback_of_a_frozen_weight_stays_as_it_is():
    model = tiny_gpt()
    layer = model.blocks[0].mlp.fc
    layer.weight.requires_grad_(False)
    rule = KolenPollack.Config().build(model, Streams(0))
    before = {name: matrix.clone() for name, matrix in rule.feedback.items()}
    weight = layer.weight.clone()
    Gradient(model, CrossEntropy(), Uniform(), rule, SGD(lr=1.0), Solo()).step(tiny_batch())
    assert torch.equal(layer.weight, weight)
    assert {n for n in before if torch.equal(rule.feedback[n], before[n])} == {"blocks.0.mlp.fc"}
