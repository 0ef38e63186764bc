"""GrAPE: estimates of the weights by forward mode, the cosine that they raise, and no weight that carries an error."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from heterodox.core.comm import Solo
from heterodox.core.rng import Streams
from heterodox.credit import Backprop, FeedbackAlignment
from heterodox.credit.feedback import linear_layers
from heterodox.credit.feedback_alignment import Grape, cosine_gradient, norm_estimate, tangent
from heterodox.learner import Gradient
from heterodox.objective import CrossEntropy
from heterodox.rating import Uniform
from heterodox.update import AdamW
from tests.measured import differ, on_average, within
from tests.tiny import tiny_batch, tiny_gpt

WEIGHTS = torch.ones(4, dtype=torch.float64)
COSINES = ["probes", "jacobian"]
FAN_OUT, FAN_IN = 6, 9


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum() / (a.norm() * b.norm())


def cosines(rule: FeedbackAlignment, model) -> dict[str, float]:
    layers = linear_layers(model)
    return {name: float(cosine(matrix, layers[name].weight.detach())) for name, matrix in rule.feedback.items()}


def rule_of(model, **options) -> FeedbackAlignment:
    return FeedbackAlignment.Config(grape=Grape.Config(**options)).build(model, Streams(0))


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")  # of torch, within jvp
@pytest.mark.parametrize("lead", [(), (5,), (2, 5), (2, 1, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_probes_go_through_the_layer_as_forward_mode_takes_them(lead, bias):
    layer = nn.Linear(FAN_IN, FAN_OUT, bias=bias).double()
    at, probes = normal(*lead, FAN_IN), normal(*lead, FAN_IN, seed=1)
    _, answers = torch.func.jvp(layer, (at,), (probes,))
    assert torch.allclose(tangent(layer, probes), answers, rtol=1e-12)
    assert answers.norm() > 0.1


def test_the_estimate_of_the_jacobian_and_of_its_norm_are_right_on_average():
    weight, probes = normal(FAN_OUT, FAN_IN), normal(200_000, FAN_IN, seed=1)
    answers = probes @ weight.T
    assert on_average(answers.T @ probes / len(probes), weight, atol=0.05)
    assert on_average(norm_estimate(answers), weight.norm(), rtol=0.01)
    squares = torch.stack(
        [(a.T @ p / 32).square().sum() for a, p in zip(answers.split(32), probes.split(32), strict=True)]
    )
    assert on_average(squares.mean(), weight.square().sum() * (1 + (FAN_IN + 1) / 32), rtol=0.02)


@pytest.mark.parametrize("kind", COSINES)
def test_the_gradient_is_the_cosine_s_own(kind):
    weight, probes = normal(FAN_OUT, FAN_IN), normal(4, FAN_IN, seed=1)
    feedback, answers = normal(FAN_OUT, FAN_IN, seed=2).requires_grad_(), probes @ weight.T
    if kind == "probes":
        value = cosine(probes @ feedback.T, answers)
    else:
        value = cosine(feedback, sum(torch.outer(u, v) for u, v in zip(answers, probes, strict=True)) / 4)
    (wanted,) = torch.autograd.grad(value, feedback)
    assert wanted.norm() > 1e-3
    assert torch.allclose(cosine_gradient(feedback.detach(), probes, answers, kind), wanted, rtol=1e-11, atol=1e-14)


def test_feedback_that_has_aligned_stays_where_it_is_with_common_probes_alone():
    weight, probes = normal(FAN_OUT, FAN_IN), normal(4, FAN_IN, seed=1)
    gradients = {kind: cosine_gradient(3 * weight, probes, probes @ weight.T, kind) for kind in COSINES}
    assert within(gradients["probes"].norm(), 1e-14, "absolute")
    assert gradients["jacobian"].norm() > 1e-2


@pytest.mark.parametrize("kind", COSINES)
def test_a_step_up_raises_the_cosine_with_the_weights_and_a_step_down_lowers_it(kind):
    weight = normal(FAN_OUT, FAN_IN)
    change = {}
    for sign in (1, -1):
        changes = []
        for seed in range(1, 200):
            feedback, probes = normal(FAN_OUT, FAN_IN, seed=seed), normal(4, FAN_IN, seed=1000 + seed)
            gradient = cosine_gradient(feedback, probes, probes @ weight.T, kind)
            moved = feedback + sign * 0.01 * feedback.norm() ** 2 * gradient
            changes.append(cosine(moved, weight) - cosine(feedback, weight))
        change[sign] = torch.stack(changes).mean()
    assert change[1] > 1e-3
    assert change[-1] < -1e-3


@pytest.mark.parametrize(("kind", "least"), [("probes", 0.99), ("jacobian", 0.85)])
def test_feedback_aligns_with_weights_that_learn(kind, least):
    model = tiny_gpt()
    rule = rule_of(model, probes=8, cosine=kind, head=True)
    fixed = FeedbackAlignment.Config().build(model, Streams(0))
    learner = Gradient(model, CrossEntropy(), Uniform(), rule, AdamW(lr=1e-3), Solo())
    walk = [cosines(rule, model)]
    for step in range(150):
        learner.step(tiny_batch(seed=step))
        if step in (19, 149):
            walk.append(cosines(rule, model))
    assert max(abs(value) for value in walk[0].values()) < 0.5
    for earlier, later in pairwise(walk):
        assert sum(later.values()) > sum(earlier.values())
    assert min(walk[-1].values()) > least
    assert max(cosines(fixed, model).values()) < 0.5, "the weights came to the feedback"


def test_the_head_keeps_its_matrix_unless_it_is_aligned_too():
    """The source aligns the hidden layers alone."""
    for head in (False, True):
        model = tiny_gpt()
        rule = rule_of(model, probes=8, head=head)
        before = {name: matrix.clone() for name, matrix in rule.feedback.items()}
        rule.signal(model, tiny_batch(), torch.ones(4).double(), CrossEntropy())
        stayed = {name for name, matrix in rule.feedback.items() if torch.equal(matrix, before[name])}
        assert stayed == (set() if head else {"head"})


def test_the_norm_is_matched_or_kept():
    model = tiny_gpt()
    layers = linear_layers(model)
    for norm in ("match", "keep"):
        rule = rule_of(model, norm=norm, probes=64)
        drawn = {name: matrix.norm() for name, matrix in rule.feedback.items()}
        rule.grape.align(layers, rule.feedback)
        for name, matrix in rule.feedback.items():
            if norm == "match":
                assert on_average(matrix.norm(), layers[name].weight.norm(), rtol=0.25), name
            else:
                assert torch.allclose(matrix.norm(), drawn[name], rtol=1e-12), name
            assert differ(layers[name].weight.norm(), drawn[name], rtol=0.5), "degenerate"


def test_a_layer_of_zeros_leaves_its_feedback_alone():
    layer = nn.Linear(FAN_IN, FAN_OUT, bias=False).double()
    nn.init.zeros_(layer.weight)
    feedback = {"layer": normal(FAN_OUT, FAN_IN)}
    before = feedback["layer"].clone()
    for kind in COSINES:
        Grape(Streams(0), cosine=kind).align({"layer": layer}, feedback)
        assert torch.allclose(feedback["layer"], before, rtol=1e-12)


@pytest.mark.parametrize("norm", ["match", "keep"])
@pytest.mark.parametrize("kind", COSINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_feedback_of_zeros_has_no_direction_to_turn_and_stays(kind, norm, dtype):
    for weight in (normal(FAN_OUT, FAN_IN), torch.zeros(FAN_OUT, FAN_IN)):
        layer = nn.Linear(FAN_IN, FAN_OUT, bias=False).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
        feedback = {"layer": torch.zeros(FAN_OUT, FAN_IN, dtype=dtype)}
        Grape(Streams(0), cosine=kind, norm=norm).align({"layer": layer}, feedback)
        assert torch.equal(feedback["layer"], torch.zeros(FAN_OUT, FAN_IN, dtype=dtype))


def test_probes_are_new_at_every_step_and_the_same_after_a_resume():
    model = tiny_gpt()
    layers, first, second = linear_layers(model), rule_of(model), rule_of(model)
    first.grape.align(layers, first.feedback)
    saved = {name: matrix.clone() for name, matrix in first.feedback.items()}
    second.load_state({"feedback": saved, "grape": first.state()["grape"]})
    stale = rule_of(model)
    stale.load_state({"feedback": saved, "grape": {"step": 0}})
    for rule in (first, second, stale):
        rule.grape.align(layers, rule.feedback)
    for name, matrix in first.feedback.items():
        assert torch.equal(matrix, second.feedback[name])
        assert not torch.equal(matrix, stale.feedback[name])


class Roles(TorchDispatchMode):
    """Notes what every operation, those of the backward pass among them, does with any of `weights`.

    A linear layer is x Wᵀ forwards and δ W backwards, so the strides of W tell which of the two a product is.
    """

    def __init__(self, weights) -> None:
        super().__init__()
        self.storages = {weight.untyped_storage().data_ptr() for weight in weights}
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operands = [a for a in args if isinstance(a, torch.Tensor)]
        operands += [tensor for a in args if isinstance(a, (list, tuple)) for tensor in a if torch.is_tensor(tensor)]
        for place, operand in enumerate(operands):
            if operand.untyped_storage().data_ptr() in self.storages:
                name = function.overloadpacket.__name__
                transposed = operand.ndim == 2 and operand.stride(0) == 1
                last = place == len(operands) - 1
                role = "x Wᵀ" if transposed and last else "not x Wᵀ"
                self.seen.add(role if name in ("mm", "addmm", "bmm") else name)
        return function(*args, **(kwargs or {}))


def roles(rule, model) -> set[str]:
    """What the weights of the linear layers are used for, but for views of them."""
    with Roles([layer.weight for layer in linear_layers(model).values()]) as mode:
        rule.signal(model, tiny_batch(), WEIGHTS, CrossEntropy())
    return mode.seen - {"t", "detach", "alias"}


@pytest.mark.parametrize("kind", COSINES)
def test_weights_are_used_forwards_alone(kind):
    model = tiny_gpt()
    assert roles(rule_of(model, cosine=kind), model) == {"x Wᵀ"}
    assert roles(Backprop(), model) == {"x Wᵀ", "not x Wᵀ"}, "the test does not see backprop's way back"


def test_weights_poisoned_after_the_forward_pass_do_not_reach_the_signal():
    """Once there are logits, no weight's value matters: NaN in every linear layer changes nothing."""
    model = tiny_gpt()
    parameters = [parameter for layer in linear_layers(model).values() for parameter in layer.parameters()]

    class Poison(CrossEntropy):
        def losses(self, logits, batch):
            for parameter in parameters:
                parameter.data.fill_(torch.nan)
            return super().losses(logits, batch)

    def grads_of(rule, objective):
        kept = [parameter.data.clone() for parameter in parameters]
        grads = rule.signal(model, tiny_batch(), WEIGHTS, objective).grads
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)
        return grads

    clean, poisoned = (grads_of(rule_of(model), objective) for objective in (CrossEntropy(), Poison()))
    assert all(torch.equal(clean[name], poisoned[name]) for name in clean)
    assert all(gradient.isfinite().all() and gradient.norm() > 0 for gradient in poisoned.values())
    assert not grads_of(Backprop(), Poison())["blocks.0.mlp.fc.weight"].isfinite().all(), "the poison does not work"
