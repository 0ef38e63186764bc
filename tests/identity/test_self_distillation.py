"""Self-distillation against its formula, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.credit import Backprop
from heterodox.learner.step import Gradient
from heterodox.objective import CrossEntropy, SelfDistillation
from heterodox.objective.self_distillation import kl_divergence
from heterodox.rating import Uniform
from heterodox.update import SGD, Sparse
from tests.tiny import tiny_batch, tiny_gpt, tiny_recipe
from tests.tiny_sparse import supply


def distilled(steps: int = 10, update=None, **options) -> Gradient:
    model = tiny_gpt()
    objective = SelfDistillation(**{"warmup_steps": 0, "decay": 0.9} | options)
    update = update or SGD(lr=0.1)
    services = Services(model, Streams(0), Solo(), supply, steps)
    for part in (objective, update):
        if hasattr(part, "connect"):
            part.connect(services)
    learner = Gradient(model, objective, Uniform(), Backprop(), update, Solo())
    learner.begin()
    return learner


def test_divergence_is_that_of_torch_and_not_the_other_way_round():
    student, teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = kl_divergence(student, teacher)
    logs = [F.log_softmax(logits, -1) for logits in (student, teacher)]
    theirs = F.kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(-1).mean(1)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    assert not torch.allclose(ours, kl_divergence(teacher, student), rtol=1e-2)
    assert torch.equal(kl_divergence(student, student), torch.zeros(3, dtype=torch.float64))


def test_weight_warms_up_and_then_falls_along_a_cosine():
    objective = distilled(steps=10, warmup_steps=2, start=0.5, end=0.1, anneal=0.4).objective
    seen = []
    for _ in range(8):
        seen.append(objective.alpha)
        objective.advance()
    cosine = [0.1 + 0.2 * (1 + math.cos(math.pi * t / 4)) for t in range(5)]
    assert seen == pytest.approx([0.0, 0.0, *cosine, 0.1])


def test_loss_is_cross_entropy_and_the_weighted_divergence():
    learner = distilled()
    for step in range(3):
        learner.step(tiny_batch(seed=step))
    objective, batch = learner.objective, tiny_batch(seed=7)
    logits = learner.model(batch.inputs)
    teacher = tiny_gpt()
    teacher.load_state_dict(objective.state()["teacher"], strict=False)
    divergence = kl_divergence(logits, teacher(batch.inputs))
    plain = CrossEntropy().losses(logits, batch)
    assert torch.allclose(objective.losses(logits, batch), plain + objective.alpha * divergence, rtol=1e-12)
    assert bool((divergence > 1e-6).all())


def test_teacher_is_the_average_of_masked_weights():
    update = Sparse.Config.model_validate({"around": "sgd", "lr": 0.1, "topology": "static", "sparsity": 0.5}).build()
    learner = distilled(update=update)
    name = "blocks.0.mlp.fc.weight"
    average = learner.model.get_parameter(name).detach().clone()
    gone = ~update.masks.views[name]
    for step in range(4):
        learner.step(tiny_batch(seed=step))
        average = 0.9 * average + 0.1 * learner.model.get_parameter(name).detach()
    teacher = learner.objective.state()["teacher"][name]
    assert torch.allclose(teacher, average, rtol=1e-12)
    assert not teacher[gone].any()
    assert not torch.allclose(teacher, learner.model.get_parameter(name), rtol=1e-3)


def test_without_weight_it_is_cross_entropy_to_the_bit():
    mine, plain = distilled(start=0.0, end=0.0), tiny_gpt()
    learner = Gradient(plain, CrossEntropy(), Uniform(), Backprop(), SGD(lr=0.1), Solo())
    distilling = distilled()
    for step in range(4):
        for one in (mine, learner, distilling):
            report = one.step(tiny_batch(seed=step))
    assert all(torch.equal(a, b) for a, b in zip(mine.model.parameters(), plain.parameters(), strict=True))
    assert not torch.equal(distilling.model.head.weight, plain.head.weight)
    assert report.metrics["distillation_divergence"] > 0


def test_the_teachers_pass_is_charged_once_and_only_when_it_is_made():
    for warmup in (0, 5):
        learner = distilled(warmup_steps=warmup)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            report = learner.step(tiny_batch())
        assert report.cost.flops == counter.get_total_flops()
        plain = learner.model.forward_flops(4, 6).with_backward
        assert (report.cost.flops > plain) == (warmup == 0)


def test_what_cannot_be_is_refused():
    with pytest.raises(RecipeError, match=r"warmup_steps is 40, expected below the 30 steps"):
        tiny_recipe(objective={"name": "self_distillation", "warmup_steps": 40})
    with pytest.raises(RecipeError, match=r"run.budget is in tokens"):
        tiny_recipe(objective={"name": "self_distillation", "warmup_steps": 4}, run={"budget": {"tokens": 4000}})
